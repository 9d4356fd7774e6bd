#include "cpu/decode_tensors.h"
#include "cpu/isa.h"
#include "cpu/ops.h"

namespace ea::cpu {
namespace {

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

template <typename Value>
std::tuple<Tensor, Tensor> attend(const Tensor& given, const Cached& cached, const Options& options) {
  const Tensor query = given.stride(3) == 1 ? given : torch::stable::contiguous(given);
  DecodeCall<Value> call = call_of<Value>(query, cached, options);
  const int64_t key_heads = cached.key.size(1), value_heads = cached.value.size(1);
  for (int64_t b = 0; b < (options.one_map() ? 1 : call.batch); ++b) {
    call.families.push_back(
        head_families(head_index(options.q_to_k, b, call.heads, key_heads, "q_to_k"),
                      head_index(options.q_to_v, b, call.heads, value_heads, "q_to_v"),
                      int(key_heads), int(value_heads)));
  }
  return finish(call, query);
}

// Where the rows of a tensor of (batch, heads, tokens, dim) lie. A tensor is asked once: it answers from
// another library, which takes as long as a few loads.
template <typename Value>
struct QueryRows {
  const Value* data;
  int64_t batch_step, head_step, token_step, dim_step, dim;

  explicit QueryRows(const Tensor& x)
      : data(static_cast<const Value*>(x.const_data_ptr())), batch_step(x.stride(0)),
        head_step(x.stride(1)), token_step(x.stride(2)), dim_step(x.stride(3)), dim(x.size(3)) {}

  Value* copy(int64_t b, int64_t h, int64_t i, Value* out) const {
    const Value* row = data + b * batch_step + h * head_step + i * token_step;
    for (int64_t d = 0; d < dim; ++d) out[d] = row[d * dim_step];
    return out + dim;
  }
};

// Rows of q_latent and q_rope side by side, tokens before heads.
template <typename Value>
std::vector<Value> joined(const Tensor& q_latent, const Tensor& q_rope) {
  const int64_t batch = q_latent.size(0), heads = q_latent.size(1), tokens = q_latent.size(2);
  const QueryRows<Value> latents(q_latent), ropes(q_rope);
  std::vector<Value> rows(batch * tokens * heads * (latents.dim + ropes.dim));
  Value* out = rows.data();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < tokens; ++i) {
      for (int64_t h = 0; h < heads; ++h) out = ropes.copy(b, h, i, latents.copy(b, h, i, out));
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

}  // namespace

std::tuple<Tensor, Tensor> attention_decode(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths,
    std::optional<Tensor> block_table, std::optional<Tensor> q_to_k, std::optional<Tensor> q_to_v,
    std::optional<int64_t> window_left, double scale, double softcap) {
  check_fit("attention_decode", query, key_cache, value_cache);
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
