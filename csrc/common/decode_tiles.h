#pragma once

#include <cstdint>

#include "common/macros.h"

// Tiles of query rows, the (head, token) pairs of query heads that read one key head. A tile never holds
// rows of two key heads, for it is multiplied with the keys of one.

namespace ea {

// Row `row` of a key head: of its readers in ascending order, which one, and which of its tokens.
struct QueryRow {
  int reader, token;
};

EA_HOST_DEVICE QueryRow query_row(int row, int tokens) { return {row / tokens, row % tokens}; }

// How many of the query heads read key head `key_head`.
EA_HOST_DEVICE int count_readers(const int32_t* q_to_k, int heads, int key_head) {
  int readers = 0;
  for (int h = 0; h < heads; ++h) readers += q_to_k[h] == key_head;
  return readers;
}

// The query head that is reader number `reader` of a key head; -1 if it has no more than that.
EA_HOST_DEVICE int find_reader(const int32_t* q_to_k, int heads, int key_head, int reader) {
  int found = -1;
  for (int h = 0; h < heads; ++h) {
    const bool reads = q_to_k[h] == key_head;
    if (reads && reader == 0) found = h;
    reader -= reads;
  }
  return found;
}

// The tiles of `rows` rows that any map of so many query heads can make at most: launches are made
// without looking at a map, which is on the device.
EA_HOST_DEVICE int64_t most_tiles(int64_t heads, int64_t tokens, int64_t key_heads, int64_t rows) {
  const int64_t groups = heads < key_heads ? heads : key_heads;
  return groups + (heads * tokens - groups) / rows;
}

}  // namespace ea
