#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/macros.h"

// How rows are sorted by bin within every segment of every level: in tiles, each of which is placed by
// a thread block of its own (cuda/sort_block.h).

namespace ea {

// The rows of a head are its tokens, several times over: row r is token r % tokens.
struct SegmentSort {
  static constexpr int kMaxLevels = 24;

  struct Level {
    int32_t size;        // positions in a segment
    int32_t lowest;      // number of the first segment; those of all levels begin at position 0
    int32_t tiles;       // in a segment
    int32_t first_tile;  // how many tiles of a head are in the levels before
  };

  int32_t tokens, repeats, first;  // token 0 is at position `first`
  int32_t bins, warps;
  int32_t levels, tiles;  // tiles of a head
  Level level[kMaxLevels];

  EA_HOST_DEVICE int32_t shared_words() const { return (warps + 1) * bins + warps; }
};

// The rows [from, to) of a segment, counted within it.
struct SortTile {
  int32_t level;
  int32_t begin, tokens;  // the segment
  int32_t from, to;
};

EA_HOST_DEVICE SortTile tile_of(const SegmentSort& sort, int32_t number) {
  int32_t l = 0;
  while (l + 1 < sort.levels && sort.level[l + 1].first_tile <= number) ++l;
  const SegmentSort::Level& level = sort.level[l];
  const int32_t within = number - level.first_tile, tile = within % level.tiles;
  const int64_t position = int64_t(level.lowest + within / level.tiles) * level.size - sort.first;
  const int64_t end = position + level.size;
  SortTile result;
  result.level = l;
  result.begin = position < 0 ? 0 : int32_t(position);
  result.tokens = int32_t(end < sort.tokens ? end : sort.tokens) - result.begin;
  const int32_t rows = result.tokens * sort.repeats, share = ceil_div(rows, level.tiles);
  result.from = tile * share < rows ? tile * share : rows;
  result.to = result.from + share < rows ? result.from + share : rows;
  return result;
}

constexpr int64_t kMostWarps = 16;
// A tile of a segment counts all of it, so there are not many.
constexpr int64_t kMostTiles = 16;
constexpr int64_t kLeastRowsOfTile = 1024, kLeastRowsOfWarp = 64;
constexpr int64_t kTilesPerProcessor = 4;

// Fills in how a device sorts, or returns why it cannot.
inline std::string plan_segment_sort(
    const std::vector<int64_t>& sizes, int64_t tokens, int64_t repeats, int64_t first, int64_t bins,
    int64_t heads, int64_t processors, int64_t shared_bytes, SegmentSort* sort) {
  const int64_t levels = int64_t(sizes.size()), rows = tokens * repeats;
  // One word more per warp for sums, and counts of what follows the tile.
  const int64_t warps = (shared_bytes / 4 - bins) / (bins + 1);
  if (levels > SegmentSort::kMaxLevels) {
    return "got " + std::to_string(levels) + " levels; " +
           std::to_string(SegmentSort::kMaxLevels) + " are supported.";
  }
  if (rows + std::abs(first) >= 1 << 30) {
    return "got " + std::to_string(rows) + " rows from " + std::to_string(first) +
           " on; less than 2**30 are supported.";
  }
  if (bins < 1 || warps < 1) {
    return "got " + std::to_string(bins) + " bins; a device with " +
           std::to_string(shared_bytes) + " bytes of shared memory takes 1 to " +
           std::to_string(shared_bytes / 8) + ".";
  }
  const auto floor_div = [](int64_t a, int64_t b) { return a / b - (a % b < 0); };
  const int64_t rows_of_tile = std::max(
      kLeastRowsOfTile, ceil_div(heads * levels * rows, kTilesPerProcessor * processors));
  *sort = {};
  sort->tokens = int32_t(tokens);
  sort->repeats = int32_t(repeats);
  sort->first = int32_t(first);
  sort->bins = int32_t(bins);
  sort->levels = int32_t(levels);
  int64_t tiles = 0, most_rows = 0;
  for (int64_t l = 0; l < levels; ++l) {
    if (sizes[l] < 1) return "got a segment of size " + std::to_string(sizes[l]) + ".";
    // A segment longer than everything there is holds everything, whatever its size.
    const int64_t size = std::min<int64_t>(sizes[l], int64_t(1) << 30);
    const int64_t lowest = floor_div(first, size), highest = floor_div(first + tokens - 1, size);
    const int64_t rows_of_segment = std::min(size, tokens) * repeats;
    const int64_t share =
        std::min(kMostTiles, std::max<int64_t>(1, ceil_div(rows_of_segment, rows_of_tile)));
    sort->level[l] = {int32_t(size), int32_t(lowest), int32_t(share), int32_t(tiles)};
    tiles += (highest - lowest + 1) * share;
    most_rows = std::max(most_rows, ceil_div(rows_of_segment, share));
  }
  sort->warps = int32_t(std::min({warps, kMostWarps, ceil_div(most_rows, kLeastRowsOfWarp)}));
  if (tiles * heads >= int64_t(1) << 31) return "got more segments than a grid has blocks.";
  sort->tiles = int32_t(tiles);
  return "";
}

}  // namespace ea
