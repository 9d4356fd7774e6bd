#pragma once

#include <cstdint>

#include "common/macros.h"

namespace ea {

// A stable counting sort of `count` items: sorted holds them by bin_of(item), those of one bin as they
// come. item_at(i) is the i-th item; starts has room for num_bins + 1 entries, and afterwards starts[b]
// is where the items of bin b begin.
template <typename ItemAt, typename BinOf>
EA_HOST_DEVICE void counting_sort(
    int64_t count, int64_t num_bins, const ItemAt& item_at, const BinOf& bin_of, int32_t* starts,
    int32_t* sorted) {
  for (int64_t b = 0; b <= num_bins; ++b) starts[b] = 0;
  for (int64_t i = 0; i < count; ++i) ++starts[bin_of(item_at(i)) + 1];
  for (int64_t b = 0; b < num_bins; ++b) starts[b + 1] += starts[b];
  // Filling moves each start to its end, which is the start of the next.
  for (int64_t i = 0; i < count; ++i) {
    const int32_t item = item_at(i);
    sorted[starts[bin_of(item)]++] = item;
  }
  for (int64_t b = num_bins; b > 0; --b) starts[b] = starts[b - 1];
  starts[0] = 0;
}

}  // namespace ea
