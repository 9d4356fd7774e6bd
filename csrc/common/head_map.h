#pragma once

#include <cstdint>

#include "common/macros.h"

namespace ea {

// Inverts a head index into compressed sparse rows: the query heads that read head g are
// members[starts[g]] .. members[starts[g + 1] - 1], in ascending order. A counting sort, so the
// order is that of HeadMap.inverse_k() in Python.
//
// index: (num_q_heads), entries in [0, num_heads); starts: (num_heads + 1); members: (num_q_heads).
EA_HOST_DEVICE void invert_head_index(
    const int32_t* index, int num_q_heads, int num_heads, int32_t* starts, int32_t* members) {
  for (int g = 0; g <= num_heads; ++g) starts[g] = 0;
  for (int h = 0; h < num_q_heads; ++h) ++starts[index[h] + 1];
  for (int g = 0; g < num_heads; ++g) starts[g + 1] += starts[g];
  // Filling moves each start to its end; walking the heads backwards moves the ends to the starts.
  for (int h = num_q_heads - 1; h >= 0; --h) members[--starts[index[h] + 1]] = h;
  // Now starts[g + 1] holds the start of group g.
  for (int g = 0; g < num_heads; ++g) starts[g] = starts[g + 1];
  starts[num_heads] = num_q_heads;
}

// The head that query head `head` reads where the index is implied: even contiguous groups.
EA_HOST_DEVICE int even_group(int head, int num_q_heads, int num_heads) {
  return head / (num_q_heads / num_heads);
}

}  // namespace ea
