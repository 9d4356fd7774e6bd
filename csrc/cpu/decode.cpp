#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/decode_run.h"
#include "cpu/isa.h"
#include "cpu/ops.h"

// Tensors to plain pointers, and checks of what would make the kernel read elsewhere.

namespace ea::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Integers integers(const Tensor& tensor, int64_t row = 0) {
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || tensor.scalar_type() == ScalarType::Int,
                  "a tensor of lengths, pages or heads has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), "; pass int32 or int64.");
  const int64_t offset = tensor.dim() == 2 ? row * tensor.stride(0) : 0;
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  return {data + offset * (wide ? 8 : 4), tensor.stride(-1), wide};
}

// A cache of (sequences or pages, heads, rows, dim), or of one head without its dimension.
template <typename Value>
CachedRows<Value> cached_rows(const Tensor& cache) {
  const int64_t head_step = cache.dim() == 4 ? cache.stride(1) : 0;
  return {static_cast<const Value*>(cache.const_data_ptr()), cache.stride(0), head_step,
          cache.stride(-2), cache.stride(-1), cache.size(-1), cache.size(-2), {}, 0};
}

std::vector<int32_t> head_index(
    const std::optional<Tensor>& map, int64_t row, int64_t num_q_heads, int64_t num_heads,
    const char* name) {
  STD_TORCH_CHECK(num_heads > 0 && (map || num_q_heads % num_heads == 0), num_q_heads,
                  " query heads do not divide evenly among ", num_heads, " heads; pass ", name, ".");
  STD_TORCH_CHECK(!map || map->size(-1) == num_q_heads, name, " has ", map ? map->size(-1) : 0,
                  " entries; there are ", num_q_heads, " query heads.");
  std::vector<int32_t> index(num_q_heads);
  const Integers given = map ? integers(*map, row) : Integers{};
  for (int64_t h = 0; h < num_q_heads; ++h) {
    const int64_t head =
        map ? given.at(h) : even_group(int(h), int(num_q_heads), int(num_heads));
    STD_TORCH_CHECK(head >= 0 && head < num_heads, name, " holds ", head,
                    "; every entry must lie in [0, ", num_heads, ").");
    index[h] = int32_t(head);
  }
  return index;
}

struct Cached {
  const Tensor &key, &value;
  const Tensor& lengths;
  const std::optional<Tensor>& table;
};

// Lengths, and the table, after a look at every entry that will be used.
template <typename Value>
void set_lengths(DecodeCall<Value>& call, const Cached& cached) {
  const Integers lengths = integers(cached.lengths);
  const int64_t pages = cached.key.size(0), page_size = cached.key.size(-2);
  int64_t capacity = page_size;
  if (cached.table) {
    call.table = integers(*cached.table);
    call.table_step = cached.table->stride(0);
    capacity *= cached.table->size(1);
  }
  STD_TORCH_CHECK(cached.lengths.size(0) == call.batch &&
                      (cached.table ? cached.table->size(0) : pages) == call.batch,
                  "cache_lengths and block_table, or the caches without one, must have one row for ",
                  "each of ", call.batch, " sequences.");
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t length = lengths.at(b);
    STD_TORCH_CHECK(length >= 0 && length <= capacity, "cache_lengths[", b, "] is ", length,
                    "; it must lie in [0, ", capacity, "], what the cache has room for.");
    for (int64_t block = 0; cached.table && block * page_size < length; ++block) {
      const int64_t page = call.pages(b).at(block);
      STD_TORCH_CHECK(page >= 0 && page < pages, "block_table[", b, ", ", block, "] is ", page,
                      "; a block that cache_lengths reaches must name a page in [0, ", pages, ").");
    }
    call.lengths.push_back(length);
  }
}

template <typename Value>
std::tuple<Tensor, Tensor> finish(DecodeCall<Value>& call, const Tensor& like) {
  using Real = RealOf<Value>;
  const ScalarType lse_dtype =
      std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
  Tensor out =
      torch::stable::new_empty(like, {call.batch, call.tokens, call.heads, call.value.dim});
  Tensor lse = torch::stable::new_empty(like, {call.batch, call.heads, call.tokens}, lse_dtype);
  call.out = static_cast<Value*>(out.mutable_data_ptr());
  call.lse = static_cast<Real*>(lse.mutable_data_ptr());
  run_decode(call);
  return {torch::stable::transpose(out, 1, 2), lse};
}

struct Options {
  const std::optional<Tensor>&q_to_k, &q_to_v;
  std::optional<int64_t> window_left;
  double scale, softcap;
};

template <typename Value>
std::tuple<Tensor, Tensor> attend(const Tensor& given, const Cached& cached, const Options& options) {
  using Real = RealOf<Value>;
  const Tensor query = given.stride(3) == 1 ? given : torch::stable::contiguous(given);
  DecodeCall<Value> call{};
  call.batch = query.size(0);
  call.heads = query.size(1);
  call.tokens = query.size(2);
  call.query = static_cast<const Value*>(query.const_data_ptr());
  call.query_batch_step = query.stride(0);
  call.query_head_step = query.stride(1);
  call.query_token_step = query.stride(2);
  call.key = cached_rows<Value>(cached.key);
  call.value = cached_rows<Value>(cached.value);
  set_lengths(call, cached);
  call.window_left = options.window_left.value_or(-1);
  call.scale = Real(options.scale);
  call.softcap = Real(options.softcap);
  const bool one_map = (!options.q_to_k || options.q_to_k->dim() == 1) &&
                       (!options.q_to_v || options.q_to_v->dim() == 1);
  const int64_t key_heads = cached.key.size(1), value_heads = cached.value.size(1);
  for (int64_t b = 0; b < (one_map ? 1 : call.batch); ++b) {
    call.families.push_back(
        head_families(head_index(options.q_to_k, b, call.heads, key_heads, "q_to_k"),
                      head_index(options.q_to_v, b, call.heads, value_heads, "q_to_v"),
                      int(key_heads), int(value_heads)));
  }
  return finish(call, query);
}

// Rows of q_latent and q_rope side by side, tokens before heads.
template <typename Value>
std::vector<Value> joined(const Tensor& q_latent, const Tensor& q_rope) {
  const int64_t batch = q_latent.size(0), heads = q_latent.size(1), tokens = q_latent.size(2);
  std::vector<Value> rows(batch * tokens * heads * (q_latent.size(3) + q_rope.size(3)));
  Value* out = rows.data();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < tokens; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        for (const Tensor* part : {&q_latent, &q_rope}) {
          const auto* row = static_cast<const Value*>(part->const_data_ptr()) +
                            b * part->stride(0) + h * part->stride(1) + i * part->stride(2);
          for (int64_t d = 0; d < part->size(3); ++d) *out++ = row[d * part->stride(3)];
        }
      }
    }
  }
  return rows;
}

template <typename Value>
std::tuple<Tensor, Tensor> attend_to_latents(
    const Tensor& q_latent, const Tensor& q_rope, const Cached& cached, double scale) {
  const std::vector<Value> query = joined<Value>(q_latent, q_rope);
  DecodeCall<Value> call{};
  call.batch = q_latent.size(0);
  call.heads = q_latent.size(1);
  call.tokens = q_latent.size(2);
  call.query = query.data();
  call.key = call.value = cached_rows<Value>(cached.key);
  call.value.dim = q_latent.size(3);
  call.value_in_key = true;
  call.query_head_step = call.key.dim;
  call.query_token_step = call.heads * call.query_head_step;
  call.query_batch_step = call.tokens * call.query_token_step;
  set_lengths(call, cached);
  call.window_left = -1;
  call.scale = RealOf<Value>(scale);
  const std::vector<int32_t> one_head(call.heads, 0);
  call.families.push_back(head_families(one_head, one_head, 1, 1));
  return finish(call, q_latent);
}

void check_one_dtype(const char* op, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == (*tensors.begin())->scalar_type(),
                    op, " got tensors of different dtypes or devices; pass them all in one dtype ",
                    "on the CPU.");
  }
}

}  // namespace

std::tuple<Tensor, Tensor> attention_decode(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths,
    std::optional<Tensor> block_table, std::optional<Tensor> q_to_k, std::optional<Tensor> q_to_v,
    std::optional<int64_t> window_left, double scale, double softcap) {
  check_one_dtype("attention_decode", {&query, &key_cache, &value_cache});
  STD_TORCH_CHECK(query.dim() == 4 && key_cache.dim() == 4 && value_cache.dim() == 4 &&
                      query.size(3) == key_cache.size(3) &&
                      key_cache.size(0) == value_cache.size(0) &&
                      key_cache.size(2) == value_cache.size(2),
                  "attention_decode got a query and caches that do not fit together.");
  const Cached cached{key_cache, value_cache, cache_lengths, block_table};
  const Options options{q_to_k, q_to_v, window_left, scale, softcap};
  switch (query.scalar_type()) {
    case ScalarType::Float: return attend<float>(query, cached, options);
    case ScalarType::BFloat16: return attend<BFloat16>(query, cached, options);
    case ScalarType::Half: return attend<Half>(query, cached, options);
    case ScalarType::Double: return attend<double>(query, cached, options);
    default: break;
  }
  STD_TORCH_CHECK(false, "attention_decode got ", torch::headeronly::toString(query.scalar_type()),
                  "; pass float16, bfloat16, float32 or float64.");
}

std::tuple<Tensor, Tensor> mla_decode(
    Tensor q_latent, Tensor q_rope, Tensor cache, Tensor cache_lengths,
    std::optional<Tensor> block_table, double scale) {
  check_one_dtype("mla_decode", {&q_latent, &q_rope, &cache});
  STD_TORCH_CHECK(q_latent.dim() == 4 && q_rope.dim() == 4 && cache.dim() == 3 &&
                      q_latent.size(3) + q_rope.size(3) == cache.size(2),
                  "mla_decode got queries and a cache that do not fit together.");
  for (int d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(q_latent.size(d) == q_rope.size(d), "q_latent and q_rope differ in shape.");
  }
  const Cached cached{cache, cache, cache_lengths, block_table};
  switch (cache.scalar_type()) {
    case ScalarType::Float: return attend_to_latents<float>(q_latent, q_rope, cached, scale);
    case ScalarType::BFloat16: return attend_to_latents<BFloat16>(q_latent, q_rope, cached, scale);
    case ScalarType::Half: return attend_to_latents<Half>(q_latent, q_rope, cached, scale);
    case ScalarType::Double: return attend_to_latents<double>(q_latent, q_rope, cached, scale);
    default: break;
  }
  STD_TORCH_CHECK(false, "mla_decode got ", torch::headeronly::toString(cache.scalar_type()),
                  "; pass float16, bfloat16, float32 or float64.");
}

}  // namespace ea::cpu
