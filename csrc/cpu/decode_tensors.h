#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/decode_run.h"
#include "integer_tensors.h"

// Tensors to plain pointers, and checks of what would make a kernel of attention to a cache read
// elsewhere.

namespace ea::cpu {
namespace {  // What holds tensors has no visibility to give.

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A cache of (sequences or pages, heads, rows, dim), or of one head without its dimension.
template <typename Value>
CachedRows<Value> cached_rows(const Tensor& cache) {
  const int64_t head_step = cache.dim() == 4 ? cache.stride(1) : 0;
  return {static_cast<const Value*>(cache.const_data_ptr()), cache.stride(0), head_step,
          cache.stride(-2), cache.stride(-1), cache.size(-1), cache.size(-2), {}, 0};
}

inline std::vector<int32_t> head_index(
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

struct Options {
  const std::optional<Tensor>&q_to_k, &q_to_v;
  std::optional<int64_t> window_left;
  double scale, softcap;

  // Whether all sequences have one map.
  bool one_map() const {
    return (!q_to_k || q_to_k->dim() == 1) && (!q_to_v || q_to_v->dim() == 1);
  }
};

inline void check_one_dtype(const char* op, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == (*tensors.begin())->scalar_type(),
                    op, " got tensors of different dtypes or devices; pass them all in one dtype ",
                    "on the CPU.");
  }
}

// What a call says of its query, its cache and the scores; the query's last dimension is contiguous.
template <typename Value>
DecodeCall<Value> call_of(const Tensor& query, const Cached& cached, const Options& options) {
  using Real = RealOf<Value>;
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
  return call;
}

inline void check_fit(
    const char* op, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache) {
  check_one_dtype(op, {&query, &key_cache, &value_cache});
  STD_TORCH_CHECK(query.dim() == 4 && key_cache.dim() == 4 && value_cache.dim() == 4 &&
                      query.size(3) == key_cache.size(3) &&
                      key_cache.size(0) == value_cache.size(0) &&
                      key_cache.size(2) == value_cache.size(2),
                  op, " got a query and caches that do not fit together.");
}

}  // namespace
}  // namespace ea::cpu
