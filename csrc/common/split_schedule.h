#pragma once

#include <cstdint>

#include "common/macros.h"

// How attention to a cache is shared among blocks: each reads one split of the keys of a sequence, and
// partial results are merged in an order that depends on lengths alone.

namespace ea {

// The splits of one sequence. Launches are made from shapes alone, so some splits may have no keys.
struct SplitSchedule {
  int tokens;  // of every split but the last
  int used;    // one at least: that of a sequence without keys says that there are none

  EA_HOST_DEVICE int first(int split) const { return split * tokens; }
  EA_HOST_DEVICE int end(int split, int num_keys) const {
    return split + 1 < used ? first(split + 1) : num_keys;
  }
};

// Splits of a multiple of `smallest` tokens.
EA_HOST_DEVICE SplitSchedule split_keys(int num_keys, int num_splits, int smallest) {
  if (num_keys == 0) return {smallest, 1};
  const int tokens = ceil_div(ceil_div(num_keys, num_splits), smallest) * smallest;
  return {tokens, ceil_div(num_keys, tokens)};
}

// One reader of more parts than this would be waited for: they are merged in groups, each by the block
// that completes it, and the groups by the block that completes the last of them.
constexpr int kMergedTogether = 12;
constexpr int kMostSplits = kMergedTogether * kMergedTogether;

// Partial results that are merged into the place of the first.
struct Merger {
  int first, step, count;

  EA_HOST_DEVICE int part(int i) const { return first + i * step; }
};

EA_HOST_DEVICE int merge_group(int split) { return split / kMergedTogether; }
EA_HOST_DEVICE int merge_groups(int used) { return ceil_div(used, kMergedTogether); }

EA_HOST_DEVICE Merger within_group(int group, int used) {
  const int first = group * kMergedTogether;
  return {first, 1, used - first < kMergedTogether ? used - first : kMergedTogether};
}

EA_HOST_DEVICE Merger between_groups(int used) { return {0, kMergedTogether, merge_groups(used)}; }

// The fewest splits with which a device that runs so many blocks at a time needs hardly more rounds of
// tokens than with any number up to `most`; fewer parts are less to merge. For sequences of `num_keys`.
inline int fewest_splits(int64_t tiles, int64_t blocks, int num_keys, int smallest, int most) {
  constexpr double kGoodEnough = 1.05;
  const auto rounds = [&](int splits) {
    const SplitSchedule schedule = split_keys(num_keys, splits, smallest);
    return ceil_div(tiles * schedule.used, blocks) * schedule.tokens;
  };
  int64_t best = rounds(1);
  for (int splits = 2; splits <= most; ++splits) {
    if (rounds(splits) < best) best = rounds(splits);
  }
  int splits = 1;
  while (double(rounds(splits)) > kGoodEnough * double(best)) ++splits;
  return splits;
}

}  // namespace ea
