#pragma once

#include <cstdint>

#include "common/macros.h"

namespace ea {

constexpr int kMostBits = 16;

// The position of a code of at most 16 bits in Gray's order, where neighbours differ in one bit.
EA_HOST_DEVICE uint32_t gray_rank(uint32_t code) {
  for (int shift = 1; shift < 16; shift *= 2) code ^= code >> shift;
  return code;
}

// The Gray rank of the bits projection > threshold, of which there are at most 16.
EA_HOST_DEVICE uint32_t sign_code(const float* projections, const float* thresholds, int bits) {
  uint32_t code = 0;
  // A constant number of steps, so that a device keeps both in registers.
  for (int j = 0; j < kMostBits; ++j) {
    if (j < bits) code |= uint32_t(projections[j] > thresholds[j]) << j;
  }
  return gray_rank(code);
}

// The tokens of a head in runs that have one mean in common, and these in parts of few tokens that are
// added up together. Runs are leaves, the first with all tokens before position 0; without leaves there
// is one run.
struct HashParts {
  static constexpr int kTokens = 128;

  int32_t tokens, first, leaf;  // token 0 is at position `first`
  int32_t runs, parts, parts_of_first, parts_of_run;

  EA_HOST_DEVICE static HashParts make(int32_t tokens, int32_t first, int32_t leaf) {
    HashParts parts{tokens, first, leaf, 1, 0, 0, 0};
    if (leaf > 0) parts.runs = parts.run_of(tokens - 1) + 1;
    parts.parts_of_first = ceil_div(parts.run_end(0), kTokens);
    parts.parts_of_run = ceil_div(leaf, kTokens);
    parts.parts = parts.parts_of_first + (parts.runs - 1) * parts.parts_of_run;
    return parts;
  }

  EA_HOST_DEVICE int32_t run_of(int32_t token) const {
    if (leaf == 0 || first + token < 0) return 0;
    return (first + token) / leaf - (first > 0 ? first / leaf : 0);
  }
  EA_HOST_DEVICE int32_t run_begin(int32_t run) const {
    return run == 0 ? 0 : ((first > 0 ? first / leaf : 0) + run) * leaf - first;
  }
  EA_HOST_DEVICE int32_t run_end(int32_t run) const {
    return run + 1 < runs ? run_begin(run + 1) : tokens;
  }

  EA_HOST_DEVICE int32_t run_of_part(int32_t part) const {
    return part < parts_of_first ? 0 : 1 + (part - parts_of_first) / parts_of_run;
  }
  EA_HOST_DEVICE bool begins_run(int32_t part) const {
    return part < parts_of_first ? part == 0 : (part - parts_of_first) % parts_of_run == 0;
  }
  // The tokens [begin, end) of a part; the last ones of the last run can be empty.
  EA_HOST_DEVICE int32_t part_begin(int32_t part) const {
    const int32_t run = run_of_part(part);
    const int32_t within =
        run == 0 ? part : part - parts_of_first - (run - 1) * parts_of_run;
    const int32_t begin = run_begin(run) + within * kTokens;
    return begin < tokens ? begin : tokens;
  }
  EA_HOST_DEVICE int32_t part_end(int32_t part) const {
    const int32_t full = part_begin(part) + kTokens, end = run_end(run_of_part(part));
    return full < end ? full : end;
  }
};

}  // namespace ea
