#pragma once

#include "common/online_softmax.h"
#include "common/ticket.h"
#include "cuda/decode_call.h"
#include "cuda/machine.h"

namespace ea::cuda {

constexpr int kDecodeThreads = 256;
// Of a block, on compute capability 8.0.
constexpr int64_t kSharedMemory = 163 << 10;
constexpr float kLn2 = 0.6931471805599453f;

// Where the results of a tile go: row r is row rows[r], head * tokens + token, of the sample.
struct TileResults {
  int sample, count, value_dim;
  const int* rows;  // in shared memory

  EA_DEVICE int64_t row(const DecodeCall& call, int r) const {
    return int64_t(sample) * call.heads * call.tokens + rows[r];
  }

  // The place of a row's column among the parts.
  EA_DEVICE float* part(const DecodeCall& call, int split, int r, int column) const {
    return call.parts + (split * call.num_rows() + row(call, r)) * value_dim + column;
  }
  EA_DEVICE float* part_lse(const DecodeCall& call, int split, int r) const {
    return call.part_lses + split * call.num_rows() + row(call, r);
  }

  // Two columns of a row of the output.
  template <typename Element>
  EA_DEVICE void store(const DecodeCall& call, int r, int column, float first, float second) const {
    const int head = rows[r] / call.tokens, token = rows[r] % call.tokens;
    const int64_t at = (int64_t(sample) * call.tokens + token) * call.heads + head;
    auto* out = static_cast<Element*>(call.out) + at * value_dim + column;
    *reinterpret_cast<uint32_t*>(out) = pack<Element>(first, second);
  }
};

// Whether this block is the last of `expected` to come here. What the others wrote before can be read
// then, behind the first-level cache.
EA_DEVICE bool arrives_last(uint64_t* ticket, uint64_t number, int expected, int* shared_answer) {
  fence();
  sync_block();
  if (thread() == 0) {
    uint64_t found = swap_if_equal(ticket, 0, 0), word;
    do {
      word = found;
      const Arrival arrival = arrive(word, number, expected);
      *shared_answer = arrival.is_last;
      found = swap_if_equal(ticket, word, arrival.word);
    } while (found != word);
  }
  sync_block();
  fence();
  return *shared_answer != 0;
}

// Merges parts of a tile, in their order, into the place of the first or, if they are all there is, into
// the results. weights: shared memory for kMergedTogether numbers of each row.
template <typename Element>
EA_DEVICE void merge_parts(const DecodeCall& call, const TileResults& tile, const Merger& merger,
                           bool is_all, float* weights) {
  for (int r = thread(); r < tile.count; r += kDecodeThreads) {
    float* mine = weights + r * kMergedTogether;
    for (int i = 0; i < merger.count; ++i) {
      mine[i] = load_fresh(tile.part_lse(call, merger.part(i), r));
    }
    const float lse = merge_weights(mine, merger.count, mine);
    *(is_all ? call.lse + tile.row(call, r) : tile.part_lse(call, merger.first, r)) = lse;
  }
  sync_block();
  const int pieces = tile.value_dim / 4;
  for (int item = thread(); item < tile.count * pieces; item += kDecodeThreads) {
    const int r = item / pieces, column = item % pieces * 4;
    Float4 loaded[kMergedTogether];
#pragma unroll
    for (int i = 0; i < kMergedTogether; ++i) {
      if (i < merger.count) {
        loaded[i] = load_fresh(
            reinterpret_cast<const Float4*>(tile.part(call, merger.part(i), r, column)));
      }
    }
    Float4 sum{};
#pragma unroll
    for (int i = 0; i < kMergedTogether; ++i) {
      if (i < merger.count) {
        const float weight = weights[r * kMergedTogether + i];
        // What a part that saw nothing holds is zero; it weighs nothing.
        for (int c = 0; c < 4; ++c) sum.x[c] += weight * loaded[i].x[c];
      }
    }
    if (is_all) {
      tile.store<Element>(call, r, column, sum.x[0], sum.x[1]);
      tile.store<Element>(call, r, column + 2, sum.x[2], sum.x[3]);
    } else {
      *reinterpret_cast<Float4*>(tile.part(call, merger.first, r, column)) = sum;
    }
  }
}

// After a block has stored its part: the last block of a group merges it, the last group all groups.
template <typename Element>
EA_DEVICE void finish(const DecodeCall& call, const BlockTask& task, int used,
                      const TileResults& tile, float* weights, int* shared_answer) {
  const int64_t index = int64_t(task.sample) * call.num_tiles + task.tile;
  uint64_t* tickets = call.tickets + index * call.tickets_per_tile();
  const int group = merge_group(task.split), groups = merge_groups(used);
  const Merger own = within_group(group, used);
  if (!arrives_last(tickets + 1 + group, call.number, own.count, shared_answer)) return;
  merge_parts<Element>(call, tile, own, groups == 1, weights);
  if (groups == 1 || !arrives_last(tickets, call.number, groups, shared_answer)) return;
  merge_parts<Element>(call, tile, between_groups(used), true, weights);
}

}  // namespace ea::cuda
