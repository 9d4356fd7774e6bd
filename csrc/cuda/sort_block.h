#pragma once

#include "common/segment_sort.h"
#include "cuda/machine.h"
#include "cuda/votes.h"

// What one block does to sort rows by bin: it places one tile of a segment, and counts the whole segment
// to know where the rows of the tile begin. So no block waits for another.

namespace ea::cuda {

// The sum of the values of all threads before this one. `sums` has room for one word per warp.
EA_DEVICE int32_t sum_before(int32_t value, int32_t* sums) {
  int32_t sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t other = shuffle(sum, lane() < distance ? lane() : lane() - distance);
    if (lane() >= distance) sum += other;
  }
  if (lane() == 31) sums[warp()] = sum;
  sync_block();
  int32_t before = sum - value;
  for (int w = 0; w < warp(); ++w) before += sums[w];
  return before;
}

// codes: of the rows of the head; order, rank: of head and level, inverse to each other; shared:
// sort.shared_words().
EA_DEVICE void sort_tile(const SegmentSort& sort, const SortTile& tile, const int32_t* codes,
                         int32_t* shared, int32_t* order, int32_t* rank) {
  const int32_t bins = sort.bins, warps = sort.warps, rows = tile.tokens * sort.repeats;
  const int32_t threads = 32 * warps;
  const auto row_at = [&](int32_t i) {
    if (sort.repeats == 1) return tile.begin + i;
    return i / tile.tokens * sort.tokens + tile.begin + i % tile.tokens;
  };
  // A code out of range, which is an error of the caller, must not write anywhere.
  const auto bin_of = [&](int32_t code) {
    return uint32_t(code) < uint32_t(bins) ? code : bins - 1;
  };

  // counts[w] are the bins of what comes just before the share of warp w: for the first all rows
  // before the tile, for the others the share of the warp before. `rest` is what follows.
  int32_t *counts = shared, *rest = counts + warps * bins, *sums = rest + bins;
  for (int32_t i = thread(); i < (warps + 1) * bins; i += threads) shared[i] = 0;
  sync_block();
  const int32_t share = ceil_div(tile.to - tile.from, warps);
  const auto begin_of = [&](int w) {
    return tile.from + w * share < tile.to ? tile.from + w * share : tile.to;
  };
  const auto count = [&](int32_t from, int32_t to, int32_t step, int32_t* into) {
    for (int32_t i = from; i < to; i += step) add(&into[bin_of(codes[row_at(i)])], 1);
  };
  count(thread(), tile.from, threads, counts);
  count(begin_of(warp()) + lane(), begin_of(warp() + 1), 32, counts + (warp() + 1) * bins);
  count(tile.to + thread(), rows, threads, rest);
  sync_block();

  // Counts become places: a thread takes some neighbouring bins.
  const int32_t each = ceil_div(bins, threads);
  const int32_t first = thread() * each < bins ? thread() * each : bins;
  const int32_t last = first + each < bins ? first + each : bins;
  int32_t held = 0;
  for (int32_t b = first; b < last; ++b) {
    for (int32_t w = 0; w <= warps; ++w) held += counts[w * bins + b];
  }
  int32_t start = sum_before(held, sums);
  for (int32_t b = first; b < last; ++b) {
    for (int32_t w = 0; w <= warps; ++w) {
      start += counts[w * bins + b];
      counts[w * bins + b] = start;
    }
  }
  sync_block();

  // Every warp places its share in order, a row per lane.
  int32_t* places = counts + warp() * bins;
  const int32_t segment_start = tile.begin * sort.repeats, to = begin_of(warp() + 1);
  for (int32_t i = begin_of(warp()) + lane(); i - lane() < to; i += 32) {
    const bool is_row = i < to;
    const int32_t row = is_row ? row_at(i) : 0, bin = is_row ? bin_of(codes[row]) : -1;
    const uint32_t same = lanes_with(bin);
    const int earlier = popcount(same & ((1u << lane()) - 1));
    const int32_t place = is_row ? segment_start + places[bin] + earlier : 0;
    // Votes and shuffles do not order what lanes read and write.
    sync_warp();
    if (is_row && earlier == 0) places[bin] += popcount(same);
    sync_warp();
    if (is_row) {
      order[place] = row;
      rank[row] = place;
    }
  }
}

struct SortCall {
  SegmentSort sort;
  const int32_t* codes;   // (heads, rows)
  int32_t *order, *rank;  // (heads, levels, rows)
};

// Blocks are numbered by head, then by tile.
struct SortBlock {
  using Call = SortCall;
  static constexpr int kMostThreads = 32 * kMostWarps;

  EA_DEVICE static void run(const SortCall& call, int64_t block, char* shared) {
    const SegmentSort& sort = call.sort;
    const int64_t head = block / sort.tiles, rows = int64_t(sort.tokens) * sort.repeats;
    const SortTile tile = tile_of(sort, int32_t(block % sort.tiles));
    const int64_t to = (head * sort.levels + tile.level) * rows;
    sort_tile(sort, tile, call.codes + head * rows, reinterpret_cast<int32_t*>(shared),
              call.order + to, call.rank + to);
  }
};

}  // namespace ea::cuda
