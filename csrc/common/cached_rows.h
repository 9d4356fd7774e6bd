#pragma once

#include <cstdint>

#include "common/integers.h"
#include "common/macros.h"

namespace ea {

// Where the rows of a cache lie; steps in bytes.
struct CachedRows {
  const char* data;
  int64_t page_step, head_step, row_step;
};

// A cached token: its page, and its row there. A cache without pages has one for each sequence.
struct CachedToken {
  int64_t page, row;

  EA_HOST_DEVICE int64_t offset_in(const CachedRows& rows) const {
    return page * rows.page_step + row * rows.row_step;
  }
};

// The pages of all sequences; without data, page b is that of sequence b.
struct PageTable {
  Integers pages;
  int64_t sequence_step, page_size;

  // Token `token` of a sequence, which must be one that it has: other entries may name no page.
  EA_HOST_DEVICE CachedToken token(int64_t sequence, int64_t token) const {
    if (pages.data == nullptr) return {sequence, token};
    const int64_t entry = sequence * sequence_step + token / page_size * pages.step;
    const Integers at_entry{pages.data, 1, pages.wide};
    return {at_entry.at(entry), token % page_size};
  }
};

// A length that was not checked, within what there is.
EA_HOST_DEVICE int clamped_length(int64_t length, int64_t capacity) {
  return int(length < 0 ? 0 : length > capacity ? capacity : length);
}

}  // namespace ea
