#pragma once

#include "cuda/decode_tensors.h"
#include "cuda/latent_block.h"

// mla_decode on any machine.

namespace ea::cuda {
namespace {

// Query rows up to which tiles of 16 read the latents again rather than leave half of 64 rows empty.
constexpr int kFewLatentRows = 32;

template <typename Machine>
std::tuple<Tensor, Tensor> mla_decode_on(
    const Machine& machine, const Tensor& q_latent, const Tensor& q_rope, const Tensor& cache,
    const Tensor& cache_lengths, const std::optional<Tensor>& block_table, double scale) {
  const char* op = "mla_decode";
  const int64_t rank = q_latent.size(3), width = cache.size(2);
  STD_TORCH_CHECK(rank + q_rope.size(3) == width && q_latent.size(0) == q_rope.size(0) &&
                      q_latent.size(1) == q_rope.size(1) && q_latent.size(2) == q_rope.size(2) &&
                      q_latent.scalar_type() == cache.scalar_type() &&
                      q_rope.scalar_type() == cache.scalar_type(),
                  op, " got queries and a cache that do not fit together.");
  STD_TORCH_CHECK(rank % 8 == 0 && width % 8 == 0 && rank <= 512 && width <= 576, op,
                  " got rows of ", rank, " + ", width - rank,
                  " columns; multiples of 8 are there, up to 512 and together 576.");
  DecodeCall call{};
  set_query(op, call, q_latent);
  check_query(op, q_rope);
  call.query_rope = q_rope.const_data_ptr();
  call.rope_batch_step = q_rope.stride(0);
  call.rope_head_step = q_rope.stride(1);
  call.rope_token_step = q_rope.stride(2);
  set_cache(op, call, cache, cache, cache_lengths, block_table, scale);
  call.latent_dim = int(rank);
  call.row_dim = int(width);
  const int rows = call.heads * call.tokens;
  call.smallest_split = kLatentStages * kLatentKeys;
  return for_dtype(op, q_latent, [&](auto element) {
    using Element = decltype(element);
    const auto start = [&](auto kernel, int rows_of_tile) {
      call.num_tiles = ceil_div(rows, rows_of_tile);
      return run<decltype(kernel)>(machine, call, q_latent, rank);
    };
    const bool narrow = rank <= 256 && width <= 320, few = rows <= kFewLatentRows;
    if (narrow && few) return start(LatentBlock<Element, 320, 256, 16>{}, 16);
    if (narrow) return start(LatentBlock<Element, 320, 256, 64>{}, 64);
    if (few) return start(LatentBlock<Element, 576, 512, 16>{}, 16);
    return start(LatentBlock<Element, 576, 512, 64>{}, 64);
  });
}

}  // namespace
}  // namespace ea::cuda
