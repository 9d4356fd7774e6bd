#pragma once

#include <cstdint>

#include "common/macros.h"

namespace ea {

// A key that may be selected. No two have the same token, so one of two is always better.
template <typename Real>
struct Candidate {
  Real score;
  int32_t token;
};

template <typename Real>
EA_HOST_DEVICE bool is_better(const Candidate<Real>& a, const Candidate<Real>& b) {
  // Without branches, which would be mispredicted half of the time.
  return bool(int(a.score > b.score) | (int(a.score == b.score) & int(a.token < b.token)));
}

// Moves the best candidates to the front, the fewest that measure `enough` together, and returns how many
// they are: all if that is not enough. measure(first, last) is additive and never negative; with
// last - first it is their number. Takes time in proportion to `count`, and leaves the front unsorted.
template <typename Real, typename Measure>
EA_HOST_DEVICE int64_t select_best(
    Candidate<Real>* candidates, int64_t count, double enough, const Measure& measure) {
  const auto swap = [&](int64_t a, int64_t b) {
    const Candidate<Real> held = candidates[a];
    candidates[a] = candidates[b];
    candidates[b] = held;
  };
  int64_t low = 0, high = count;  // Those before `low` are taken, those from `high` on are not.
  while (low < high) {
    // The middle one of three goes to the end as the pivot.
    const int64_t last = high - 1, middle = low + (high - low) / 2;
    if (is_better(candidates[middle], candidates[low])) swap(low, middle);
    if (is_better(candidates[last], candidates[low])) swap(low, last);
    if (is_better(candidates[middle], candidates[last])) swap(middle, last);
    int64_t pivot = low;
    for (int64_t i = low; i < last; ++i) {
      const bool better = is_better(candidates[i], candidates[last]);
      swap(i, pivot);
      pivot += better;
    }
    swap(pivot, last);
    const double before = measure(candidates + low, candidates + pivot);
    if (before >= enough) {
      high = pivot;
      continue;
    }
    enough -= before + measure(candidates + pivot, candidates + pivot + 1);
    low = pivot + 1;
    if (enough <= 0) break;
  }
  return low;
}

}  // namespace ea
