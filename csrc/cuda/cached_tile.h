#pragma once

#include "common/cached_rows.h"
#include "common/fragments.h"
#include "cuda/machine.h"

namespace ea::cuda {

// A warp begins to copy kRows cached rows of kGranules granules into a tile in shared memory, from its row
// `first` on. Lane r says where the r-th of them is; from the one with number `inside` on, and from
// granule `granules` on, the tile is filled with zeros.
template <int kRows, int kGranules>
EA_DEVICE void copy_rows(Granule* tile, int first, const char* head, int64_t row_offset, int inside,
                         int granules = kGranules) {
  static_assert(kRows <= 32 && kRows * kGranules % 32 == 0, "all lanes take part in a shuffle");
  int me = lane();
  forget(me);
#pragma unroll
  for (int i = 0; i < kRows * kGranules / 32; ++i) {
    const int index = i * 32 + me, row = index / kGranules, granule = index % kGranules;
    const int64_t offset = shuffle(row_offset, row);
    const bool there = row < inside && granule < granules;
    copy_async(tile + fragments::swizzled(first + row, granule, kGranules),
               there ? head + offset + granule * int64_t(sizeof(Granule)) : head, there);
  }
}

// The page and the row of token `token`, or the first of the cache if the sequence has no such token.
EA_DEVICE CachedToken find_token(const PageTable& table, int64_t sequence, int token, int end) {
  return token < end ? table.token(sequence, token) : CachedToken{0, 0};
}

}  // namespace ea::cuda
