#pragma once

#include "common/decode_tiles.h"
#include "cuda/decode_block.h"
#include "cuda/decode_tensors.h"

// attention_decode on any machine.

namespace ea::cuda {
namespace {

template <typename Machine>
std::tuple<Tensor, Tensor> attention_decode_on(
    const Machine& machine, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cache_lengths, const std::optional<Tensor>& block_table,
    const std::optional<Tensor>& q_to_k, const std::optional<Tensor>& q_to_v,
    std::optional<int64_t> window_left, double scale, double softcap) {
  const char* op = "attention_decode";
  const int64_t dim = key_cache.size(-1), value_dim = value_cache.size(-1);
  STD_TORCH_CHECK(!window_left && softcap == 0, op, " on CUDA has no window and no softcap.");
  STD_TORCH_CHECK(query.size(3) == dim && query.scalar_type() == key_cache.scalar_type() &&
                      query.scalar_type() == value_cache.scalar_type() &&
                      key_cache.size(0) == value_cache.size(0) &&
                      key_cache.size(2) == value_cache.size(2),
                  op, " got a query and caches that do not fit together.");
  DecodeCall call{};
  set_query(op, call, query);
  set_cache(op, call, key_cache, value_cache, cache_lengths, block_table, scale);
  call.key_heads = int(key_cache.size(1));
  call.value_heads = int(value_cache.size(1));
  const auto key_map = set_map(q_to_k, call.heads, &call.q_to_k, &call.q_to_k_step);
  const auto value_map = set_map(q_to_v, call.heads, &call.q_to_v, &call.q_to_v_step);
  STD_TORCH_CHECK(call.key_heads > 0 && (q_to_k || call.heads % call.key_heads == 0) &&
                      call.value_heads > 0 && (q_to_v || call.heads % call.value_heads == 0),
                  op, " got heads that do not form even groups, and no map.");
  const int group_rows = call.heads / call.key_heads * call.tokens;
  call.num_tiles = int(q_to_k ? most_tiles(call.heads, call.tokens, call.key_heads, kTileRows)
                              : call.key_heads * ceil_div(group_rows, kTileRows));
  call.smallest_split = kBlockKeys;
  return for_dtype(op, query, [&](auto element) {
    using Element = decltype(element);
    const auto start = [&](auto kernel) {
      return run<decltype(kernel)>(machine, call, query, value_dim);
    };
    if (dim == 64 && value_dim == 64) return start(DecodeBlock<Element, 64, 64>{});
    if (dim == 64 && value_dim == 128) return start(DecodeBlock<Element, 64, 128>{});
    if (dim == 128 && value_dim == 64) return start(DecodeBlock<Element, 128, 64>{});
    STD_TORCH_CHECK(dim == 128 && value_dim == 128, op, " got head dims ", dim, " and ", value_dim,
                    "; 64 and 128 are there.");
    return start(DecodeBlock<Element, 128, 128>{});
  });
}

}  // namespace
}  // namespace ea::cuda
