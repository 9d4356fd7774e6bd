#pragma once

#include "common/online_softmax.h"
#include "cuda/cached_tile.h"
#include "cuda/decode_merge.h"
#include "cuda/decode_rows.h"

// What one block does of attention_decode: a tile of query rows that read one key head, against one split
// of the keys. Each warp streams tiles of keys of its own through a ring of chunks in shared memory, so
// that warps do not wait for each other before the end. A chunk is the keys of a tile, or its
// values of one value head: they are read once for all query rows, whichever value heads those read.

namespace ea::cuda {

constexpr int kDecodeWarps = kDecodeThreads / 32;
constexpr int kTileKeys = 16;
constexpr int kBlockKeys = kDecodeWarps * kTileKeys;
constexpr int kDecodeStages = 4;

template <int kDimQK, int kDimV>
struct DecodeShared {
  static constexpr int kChunk = kTileKeys * (kDimQK > kDimV ? kDimQK : kDimV) / 8;
  union {
    Granule ring[kDecodeWarps][kDecodeStages][kChunk];
    float sums[kDecodeWarps][kTileRows][kDimV + 8];  // padded against conflicts of banks
    float weights[kTileRows * kMergedTogether];
  };
  float row_sums[kTileRows][kDecodeWarps], lses[kTileRows][kDecodeWarps];
  int rows[kTileRows];
  int answer;
};

// The chunks of a warp, from its first tile of keys to the end of the split.
template <int kDimQK, int kDimV>
class ChunkStream {
 public:
  EA_DEVICE ChunkStream(const DecodeCall& call, int sample, int key_head, const ValueSlots& slots,
                        int first_key, int end, Granule (*ring)[DecodeShared<kDimQK, kDimV>::kChunk])
      : call_(call), sample_(sample), slots_(slots), ring_(ring), key_(first_key), end_(end) {
    key_data_ = call.key.data + key_head * call.key.head_step;
    token_ = find_token(call.table, sample, key_ + lane() % kTileKeys, end);
    for (int i = 0; i + 1 < kDecodeStages; ++i) begin_copy();
  }

  // Waits for the next chunk, and begins to copy another in the place of the one before it.
  EA_DEVICE const Granule* next() {
    wait_copies<kDecodeStages - 2>();
    sync_warp();
    begin_copy();
    const Granule* chunk = ring_[used_];
    used_ = (used_ + 1) % kDecodeStages;
    return chunk;
  }

 private:
  EA_DEVICE void begin_copy() {
    Granule* chunk = ring_[copied_];
    copied_ = (copied_ + 1) % kDecodeStages;
    if (key_ < end_) {
      if (slot_ < 0) {
        copy_rows<kTileKeys, kDimQK / 8>(
            chunk, 0, key_data_, token_.offset_in(call_.key), end_ - key_);
      } else {
        const int head = shuffle(slots_.head, slot_);
        copy_rows<kTileKeys, kDimV / 8>(chunk, 0, call_.value.data + head * call_.value.head_step,
                                        token_.offset_in(call_.value), end_ - key_);
      }
      if (++slot_ == slots_.count) {
        slot_ = -1;
        key_ += kBlockKeys;
        token_ = find_token(call_.table, sample_, key_ + lane() % kTileKeys, end_);
      }
    }
    commit_copies();  // Of nothing, at the end: every chunk counts as one.
  }

  const DecodeCall& call_;
  const int sample_;
  const ValueSlots slots_;
  Granule (*const ring_)[DecodeShared<kDimQK, kDimV>::kChunk];
  const char* key_data_;
  int key_, end_;       // the tile of keys that is copied next, and the end of the split
  int slot_ = -1;       // of its values; -1 for the keys
  CachedToken token_;   // of the lane
  int copied_ = 0, used_ = 0;
};

// What a warp knows of its tile of query rows. The lane has numbers of rows lane / 4 and lane / 4 + 8.
template <typename Element, int kDimQK, int kDimV>
struct WarpRows {
  uint32_t query[kDimQK / 16][4];
  int slot[2], last_key[2];  // of each row: its value slot, and the last key that it sees
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};  // of exponents of two
  float weighted[kDimV / 8][4] = {};

  EA_DEVICE WarpRows(const DecodeCall& call, int sample, const TileRows& rows,
                     const ValueSlots& slots, int num_keys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = fragments::left_row(lane(), half);
      const int head = shuffle(rows.head, row), token = shuffle(rows.token, row);
      slot[half] = shuffle(slots.of_row, row);
      last_key[half] = num_keys - call.tokens + token;
      const auto* query_row = static_cast<const Element*>(call.query) +
                              sample * call.query_batch_step + head * call.query_head_step +
                              token * call.query_token_step;
#pragma unroll
      for (int k = 0; k < kDimQK / 16; ++k) {
#pragma unroll
        for (int r = half; r < 4; r += 2) {
          const auto* two = query_row + 16 * k + fragments::left_column(lane(), r);
          query[k][r] = row < rows.count ? *reinterpret_cast<const uint32_t*>(two) : 0;
        }
      }
    }
  }

  // Scores of 16 keys from `first_key` on, in the two halves of a product.
  EA_DEVICE void score(const DecodeCall& call, const Granule* keys, int first_key, int num_keys,
                       float (&scores)[2][4]) {
    const auto place = fragments::right_place(lane());
#pragma unroll
    for (int k = 0; k < kDimQK / 16; ++k) {
      uint32_t right[4];
      load_matrices(right, keys + k / 4 * 8 +
                               fragments::swizzled(place.row, k % 4 * 2 + place.granule, kDimQK / 8));
      multiply_add<Element>(scores[0], query[k], right[0], right[1]);
      multiply_add<Element>(scores[1], query[k], right[2], right[3]);
    }
    const bool is_edge = first_key + kTileKeys > num_keys - call.tokens + 1;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        scores[n][c] *= call.log2_scale;
        const int key = first_key + 8 * n + fragments::product_column(lane(), c);
        if (is_edge && key > last_key[c / 2]) scores[n][c] = -INFINITY;
      }
    }
  }

  // Scores to the weights of their values, as the left factor of a product; what has been added up fades.
  EA_DEVICE void weigh(const float (&scores)[2][4], uint32_t (&weights)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = max[half];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float score = scores[i / 2][2 * half + i % 2];
        highest = score > highest ? score : highest;
      }
      for (int step = 1; step < 4; step *= 2) {
        const float other = shuffle(highest, lane() ^ step);
        highest = other > highest ? other : highest;
      }
      // A row that has seen nothing yet must not subtract -inf from -inf.
      const float anchor = highest == -INFINITY ? 0.0f : highest;
      const float fade = exp2_of(max[half] - anchor);
      max[half] = highest;
      sum[half] *= fade;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float first = exp2_of(scores[n][2 * half] - anchor);
        const float second = exp2_of(scores[n][2 * half + 1] - anchor);
        sum[half] += first + second;
        weights[2 * n + half] = pack<Element>(first, second);
      }
#pragma unroll
      for (int n = 0; n < kDimV / 8; ++n) {
        weighted[n][2 * half] *= fade;
        weighted[n][2 * half + 1] *= fade;
      }
    }
  }

  // Adds the values of one slot to the rows that read it. For the others they weigh zero.
  EA_DEVICE void add_values(const Granule* values, int from_slot, const uint32_t (&weights)[4]) {
    uint32_t left[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) left[r] = slot[r % 2] == from_slot ? weights[r] : 0;
    const auto place = fragments::left_place(lane());
#pragma unroll
    for (int n = 0; n < kDimV / 16; ++n) {
      uint32_t right[4];
      load_matrices_transposed(
          right, values + n / 4 * 8 +
                     fragments::swizzled(place.row, n % 4 * 2 + place.granule, kDimV / 8));
      multiply_add<Element>(weighted[2 * n], left, right[0], right[1]);
      multiply_add<Element>(weighted[2 * n + 1], left, right[2], right[3]);
    }
  }

  // Leaves everything in shared memory, for the warps to be merged.
  EA_DEVICE void store(DecodeShared<kDimQK, kDimV>& shared) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = fragments::product_row(lane(), 2 * half);
      for (int step = 1; step < 4; step *= 2) sum[half] += shuffle(sum[half], lane() ^ step);
      if (lane() % 4 == 0) {
        shared.row_sums[row][warp()] = sum[half];
        shared.lses[row][warp()] =
            log_sum_exp(SoftmaxState<float>{max[half] * kLn2, sum[half]});
      }
#pragma unroll
      for (int n = 0; n < kDimV / 8; ++n) {
        float* to =
            &shared.sums[warp()][row][8 * n + fragments::product_column(lane(), 2 * half)];
        to[0] = weighted[n][2 * half];
        to[1] = weighted[n][2 * half + 1];
      }
    }
  }
};

template <typename Element, int kDimQK, int kDimV>
struct DecodeBlock {
  using Shared = DecodeShared<kDimQK, kDimV>;
  static_assert(sizeof(Shared) <= kSharedMemory, "");

  EA_DEVICE static void run(const DecodeCall& call, int64_t block, void* memory) {
    Shared& shared = *static_cast<Shared*>(memory);
    const BlockTask task(block, call);
    const int num_keys = clamped_length(call.lengths.at(task.sample), call.capacity);
    const SplitSchedule splits = split_keys(num_keys, call.num_splits, call.smallest_split);
    if (task.split >= splits.used) return;
    const TileRows rows = find_rows(call, task.sample, task.tile);
    if (rows.count == 0) return;
    if (thread() < kTileRows) shared.rows[thread()] = rows.head * call.tokens + rows.token;

    const ValueSlots slots = find_slots(rows);
    const int first = splits.first(task.split) + warp() * kTileKeys;
    const int end = splits.end(task.split, num_keys);
    ChunkStream<kDimQK, kDimV> chunks(
        call, task.sample, rows.key_head, slots, first, end, shared.ring[warp()]);
    WarpRows<Element, kDimQK, kDimV> mine(call, task.sample, rows, slots, num_keys);
    for (int key = first; key < end; key += kBlockKeys) {
      float scores[2][4] = {};
      uint32_t weights[4];
      mine.score(call, chunks.next(), key, num_keys, scores);
      mine.weigh(scores, weights);
      for (int slot = 0; slot < slots.count; ++slot) {
        mine.add_values(chunks.next(), slot, weights);
      }
    }

    wait_copies<0>();
    sync_block();  // The ring is free for the sums.
    mine.store(shared);
    sync_block();
    const TileResults tile{task.sample, rows.count, kDimV, shared.rows};
    const bool is_all = splits.used == 1;
    if (thread() < rows.count) {
      const int r = thread();
      const float lse = merge_weights(shared.lses[r], kDecodeWarps, shared.lses[r]);
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float sum = shared.row_sums[r][w];
        shared.lses[r][w] = sum == 0 ? 0 : shared.lses[r][w] / sum;
      }
      *(is_all ? call.lse + tile.row(call, r) : tile.part_lse(call, task.split, r)) = lse;
    }
    sync_block();
    for (int item = thread(); item < rows.count * (kDimV / 4); item += kDecodeThreads) {
      const int r = item / (kDimV / 4), column = item % (kDimV / 4) * 4;
      Float4 sum{};
      for (int w = 0; w < kDecodeWarps; ++w) {
        const auto part = *reinterpret_cast<const Float4*>(&shared.sums[w][r][column]);
        for (int c = 0; c < 4; ++c) sum.x[c] += shared.lses[r][w] * part.x[c];
      }
      if (is_all) {
        tile.store<Element>(call, r, column, sum.x[0], sum.x[1]);
        tile.store<Element>(call, r, column + 2, sum.x[2], sum.x[3]);
      } else {
        *reinterpret_cast<Float4*>(tile.part(call, task.split, r, column)) = sum;
      }
    }
    if (!is_all) finish<Element>(call, task, splits.used, tile, shared.weights, &shared.answer);
  }
};

}  // namespace ea::cuda
