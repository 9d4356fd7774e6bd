#pragma once

#include <cstdint>

#include "common/cached_rows.h"
#include "common/split_schedule.h"

namespace ea::cuda {

// What the kernels of attention to a cache are told: plain data, passed by value. Steps of queries in
// elements; results are contiguous.
struct DecodeCall {
  // (batch, heads, tokens, dim); of latent attention, the latent part and the rotary part.
  const void *query, *query_rope;
  int64_t query_batch_step, query_head_step, query_token_step;
  int64_t rope_batch_step, rope_head_step, rope_token_step;
  CachedRows key, value;
  PageTable table;
  Integers lengths;
  int64_t capacity;
  // Which key and which value head each query head reads; null for even groups. Steps from one sample
  // to the next, 0 where all have one map.
  const int32_t *q_to_k, *q_to_v;
  int64_t q_to_k_step, q_to_v_step;

  void* out;   // (batch, tokens, heads, value_dim)
  float* lse;  // (batch, heads, tokens)
  // (num_splits, batch, heads, tokens, value_dim), and without value_dim: where there is more than one.
  float *parts, *part_lses;
  uint64_t* tickets;  // (batch, num_tiles, tickets_per_tile)
  uint64_t number;    // of this call, for its tickets; not 0

  int batch, heads, tokens, key_heads, value_heads;
  int latent_dim, row_dim;  // of latent attention: columns that are values, and all columns
  int num_tiles, num_splits, smallest_split;
  float log2_scale;  // scores are multiplied with it, and are exponents of two then

  EA_HOST_DEVICE int tickets_per_tile() const { return merge_groups(num_splits) + 1; }
  EA_HOST_DEVICE int64_t num_rows() const { return int64_t(batch) * heads * tokens; }
  EA_HOST_DEVICE int64_t num_blocks() const { return int64_t(batch) * num_splits * num_tiles; }
};

// What one block does. Tiles are numbered first, then splits: blocks that run together read the same
// cached rows.
struct BlockTask {
  int sample, split, tile;

  EA_HOST_DEVICE BlockTask(int64_t block, const DecodeCall& call)
      : sample(int(block / call.num_tiles / call.num_splits)),
        split(int(block / call.num_tiles % call.num_splits)), tile(int(block % call.num_tiles)) {}
};

}  // namespace ea::cuda
