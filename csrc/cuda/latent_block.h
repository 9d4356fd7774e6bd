#pragma once

#include "common/online_softmax.h"
#include "cuda/cached_tile.h"
#include "cuda/decode_merge.h"

// What one block does of mla_decode: kRows query rows against one split of the latents. A tile of latents
// is copied into shared memory once, and is keys, and in its first columns values, for all rows. Eight
// warps share the scores of a tile by rows or keys and by halves of the columns, then its values by
// columns, so that the sums of every row stay in registers.

namespace ea::cuda {

constexpr int kLatentKeys = 32;
constexpr int kLatentStages = 4;
// Rows of scores are padded: eight of them, and eight of the weights that are put in their place, begin
// in different banks.
constexpr int kScoreStep = kLatentKeys + 4;

template <int kWidth, int kRows>
struct LatentShared {
  static constexpr int kTile = kLatentKeys * kWidth / 8;
  union {
    Granule tiles[kLatentStages][kTile];
    float merge_weights[kRows * kMergedTogether];
  };
  alignas(16) float scores[2][kRows][kScoreStep];  // of each half of the columns
  float factor[kRows];                             // how much of its sums each row keeps
  int rows[kRows];
  int answer;

  // The weights of a row, as numbers of two bytes, are put where its scores were.
  EA_DEVICE uint32_t* weights(int row) { return reinterpret_cast<uint32_t*>(scores[0][row]); }
};

template <typename Element, int kWidth, int kRank, int kRows>
struct LatentRows {
  using Shared = LatentShared<kWidth, kRows>;
  static constexpr int kRowTiles = kRows / 16;
  static constexpr int kSteps = kWidth / 64;         // of 32 columns; every other 32 are one half
  static constexpr int kColumnTiles = kRank / 64;    // of 8 columns, in the share of a warp
  static constexpr int kThreadsOfRow = kDecodeThreads / kRows;
  static constexpr int kKeysOfThread = kLatentKeys / kThreadsOfRow;
  static_assert(kRows == 16 || kRows == 64, "four warps share the rows or the keys");
  static_assert(kWidth % 64 == 0 && kRank % 128 == 0 && kRank <= kWidth, "");

  const DecodeCall& call;
  Shared& shared;
  int thread_ = cuda::thread();
  uint32_t query[kSteps][2][4];
  float weighted[kRowTiles][kColumnTiles][4] = {};
  // Of the row thread() / kThreadsOfRow: the last key that it sees, and its softmax, of which the sum is
  // that of this thread's keys alone.
  int last_key;
  float max = -INFINITY, sum = 0;

  EA_DEVICE LatentRows(const DecodeCall& the_call, Shared& the_shared, int first_row, int sample,
                       int num_keys)
      : call(the_call), shared(the_shared),
        last_key(num_keys - call.tokens + (first_row + thread() / kThreadsOfRow) % call.tokens) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = first_row + first_of_product() + fragments::left_row(lane(), r);
      const bool is_row = row < call.heads * call.tokens;
      const int head = is_row ? row / call.tokens : 0, token = is_row ? row % call.tokens : 0;
      const auto* latent = static_cast<const Element*>(call.query) +
                           sample * call.query_batch_step + head * call.query_head_step +
                           token * call.query_token_step;
      const auto* rope = static_cast<const Element*>(call.query_rope) +
                         sample * call.rope_batch_step + head * call.rope_head_step +
                         token * call.rope_token_step;
#pragma unroll
      for (int k = 0; k < 2 * kSteps; ++k) {
        const int column = 64 * (k / 2) + 32 * half() + 16 * (k % 2) +
                           fragments::left_column(lane(), r);
        const Element* two =
            column < call.latent_dim ? latent + column : rope + (column - call.latent_dim);
        query[k / 2][k % 2][r] =
            is_row && column < call.row_dim ? *reinterpret_cast<const uint32_t*>(two) : 0;
      }
    }
  }

  // The addresses of a lane are computed anew in every phase: kept, they would push sums out of registers.
  EA_DEVICE int thread() const { return thread_; }
  EA_DEVICE int lane() const { return thread_ % 32; }
  EA_DEVICE int warp() const { return thread_ / 32; }

  // Which half of the columns, and which rows, a warp multiplies.
  EA_DEVICE int half() const { return warp() / 4; }
  EA_DEVICE int first_of_product() const { return kRowTiles == 1 ? 0 : warp() % 4 * 16; }

  // Leaves in shared memory what half of the columns add to the scores of some rows or keys.
  EA_DEVICE void score(const Granule* tile) {
    forget(thread_);
    float product[4][4] = {};
    if constexpr (kRowTiles == 1) {
      const auto place = fragments::deep_right_place(lane());
      const int key = warp() % 4 * 8;
      const Granule* at = tile + fragments::swizzled(
                                     key + place.row, 4 * half() + place.granule, kWidth / 8);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t right[4];
        load_matrices(right, at + 8 * k);
        multiply_add<Element>(product[0], query[k][0], right[0], right[1]);
        multiply_add<Element>(product[1], query[k][1], right[2], right[3]);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) product[0][c] += product[1][c];
      store_scores(product[0], key);
    } else {
      const auto place = fragments::right_place(lane());
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int n = 0; n < 4; n += 2) {
            const int granule = 4 * half() + 2 * i + place.granule;
            uint32_t right[4];
            load_matrices(right, tile + 8 * k +
                                     fragments::swizzled(8 * n + place.row, granule, kWidth / 8));
            multiply_add<Element>(product[n], query[k][i], right[0], right[1]);
            multiply_add<Element>(product[n + 1], query[k][i], right[2], right[3]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) store_scores(product[n], 8 * n);
    }
  }

  EA_DEVICE void store_scores(const float (&product)[4], int first_key) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int row = first_of_product() + fragments::product_row(lane(), c);
      shared.scores[half()][row][first_key + fragments::product_column(lane(), c)] = product[c];
    }
  }

  // Scores to weights, some keys of a row to each thread.
  EA_DEVICE void weigh(int first_key) {
    forget(thread_);
    const int row = thread() / kThreadsOfRow, first = thread() % kThreadsOfRow * kKeysOfThread;
    float scores[kKeysOfThread], highest = max;
#pragma unroll
    for (int i = 0; i < kKeysOfThread; ++i) {
      scores[i] = (shared.scores[0][row][first + i] + shared.scores[1][row][first + i]) *
                  call.log2_scale;
      if (first_key + first + i > last_key) scores[i] = -INFINITY;
      highest = scores[i] > highest ? scores[i] : highest;
    }
#pragma unroll
    for (int step = 1; step < kThreadsOfRow; step *= 2) {
      const float other = shuffle(highest, lane() ^ step);
      highest = other > highest ? other : highest;
    }
    // A row that has seen nothing yet must not subtract -inf from -inf.
    const float anchor = highest == -INFINITY ? 0.0f : highest;
    const float kept = exp2_of(max - anchor);
    max = highest;
    sum *= kept;
    sync_warp();  // The threads of a row have read its scores.
#pragma unroll
    for (int i = 0; i < kKeysOfThread; i += 2) {
      const float one = exp2_of(scores[i] - anchor), other = exp2_of(scores[i + 1] - anchor);
      sum += one + other;
      shared.weights(row)[(first + i) / 2] = pack<Element>(one, other);
    }
    if (first == 0) shared.factor[row] = kept;
  }

  // Adds the values in the columns of this warp to the sums of all rows.
  EA_DEVICE void add_values(const Granule* tile) {
    keep(shared.factor);
#pragma unroll
    for (int k = 0; k < kLatentKeys / 16; ++k) {
      forget(thread_);
      const auto place = fragments::left_place(lane());
      uint32_t left[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const auto* row = reinterpret_cast<const Granule*>(shared.weights(16 * m + place.row));
        load_matrices(left[m], row + 2 * k + place.granule);
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t right[4];
        load_matrices_transposed(
            right, tile + fragments::swizzled(16 * k + place.row,
                                              warp() * kColumnTiles + n + place.granule,
                                              kWidth / 8));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply_add<Element>(weighted[m][n], left[m], right[0], right[1]);
          multiply_add<Element>(weighted[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }

  // Multiplies the sums of each row with its factor.
  EA_DEVICE void keep(const float* factors) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float factor = factors[16 * m + fragments::product_row(lane(), c)];
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) weighted[m][n][c] *= factor;
      }
    }
  }

  // Stores the averages of the values, and the lse, as the result or as one part of it.
  EA_DEVICE void store(const TileResults& tile, int split, bool is_all) {
    const int row = thread() / kThreadsOfRow;
#pragma unroll
    for (int step = 1; step < kThreadsOfRow; step *= 2) sum += shuffle(sum, lane() ^ step);
    if (thread() % kThreadsOfRow == 0) {
      shared.factor[row] = sum == 0 ? 0 : 1 / sum;
      if (row < tile.count) {
        const float lse = log_sum_exp(SoftmaxState<float>{max * kLn2, sum});
        *(is_all ? call.lse + tile.row(call, row) : tile.part_lse(call, split, row)) = lse;
      }
    }
    sync_block();
    keep(shared.factor);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int c = 0; c < 4; c += 2) {
        const int r = 16 * m + fragments::product_row(lane(), c);
        if (r >= tile.count) continue;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          const int column =
              8 * (warp() * kColumnTiles + n) + fragments::product_column(lane(), c);
          if (column >= call.latent_dim) continue;
          const float first = weighted[m][n][c], second = weighted[m][n][c + 1];
          if (is_all) {
            tile.store<Element>(call, r, column, first, second);
          } else {
            *reinterpret_cast<Float2*>(tile.part(call, split, r, column)) = {first, second};
          }
        }
      }
    }
  }
};

template <typename Element, int kWidth, int kRank, int kRows>
struct LatentBlock {
  using Shared = LatentShared<kWidth, kRows>;
  static_assert(sizeof(Shared) <= kSharedMemory, "");

  EA_DEVICE static void run(const DecodeCall& call, int64_t block, void* memory) {
    Shared& shared = *static_cast<Shared*>(memory);
    const BlockTask task(block, call);
    const int num_keys = clamped_length(call.lengths.at(task.sample), call.capacity);
    const SplitSchedule splits = split_keys(num_keys, call.num_splits, call.smallest_split);
    if (task.split >= splits.used) return;
    const int first = splits.first(task.split), end = splits.end(task.split, num_keys);

    // Splits begin at whole rounds of the stages.
    const auto tile_of = [&](int key) { return shared.tiles[key / kLatentKeys % kLatentStages]; };
    int sample = task.sample;
    const auto begin_copy = [&](int first_key) {
      constexpr int kRowsOfWarp = kLatentKeys / (kDecodeThreads / 32);
      if (first_key < end) {
        forget(sample);
        const int key = first_key + warp() * kRowsOfWarp;
        const CachedToken token = find_token(call.table, sample, key + lane() % kRowsOfWarp, end);
        copy_rows<kRowsOfWarp, kWidth / 8>(tile_of(first_key), warp() * kRowsOfWarp, call.key.data,
                                           token.offset_in(call.key), end - key, call.row_dim / 8);
      }
      commit_copies();  // Of nothing, at the end: every tile counts as one.
    };
    constexpr int kAhead = (kLatentStages - 1) * kLatentKeys;
    for (int key = first; key < first + kAhead; key += kLatentKeys) begin_copy(key);

    const int first_row = task.tile * kRows;
    if (thread() < kRows) shared.rows[thread()] = first_row + thread();
    LatentRows<Element, kWidth, kRank, kRows> rows(
        call, shared, first_row, task.sample, num_keys);
    for (int key = first; key < end; key += kLatentKeys) {
      wait_copies<kLatentStages - 2>();
      sync_block();
      begin_copy(key + kAhead);
      rows.score(tile_of(key));
      sync_block();
      rows.weigh(key);
      sync_block();
      rows.add_values(tile_of(key));
    }
    wait_copies<0>();
    sync_block();

    const int left = call.heads * call.tokens - first_row;
    const TileResults results{
        task.sample, left < kRows ? left : kRows, call.latent_dim, shared.rows};
    const bool is_all = splits.used == 1;
    rows.store(results, task.split, is_all);
    if (!is_all) {
      finish<Element>(call, task, splits.used, results, shared.merge_weights, &shared.answer);
    }
  }
};

}  // namespace ea::cuda
