#pragma once

#include <cstdint>

#include "common/macros.h"

namespace ea {

// The position of a code of at most 16 bits in Gray's order, where neighbours differ in one bit.
EA_HOST_DEVICE uint32_t gray_rank(uint32_t code) {
  for (int shift = 1; shift < 16; shift *= 2) code ^= code >> shift;
  return code;
}

// The Gray rank of the bits projection > threshold, of which there are at most 16.
EA_HOST_DEVICE uint32_t sign_code(const float* projections, const float* thresholds, int bits) {
  uint32_t code = 0;
  for (int j = 0; j < bits; ++j) code |= uint32_t(projections[j] > thresholds[j]) << j;
  return gray_rank(code);
}

}  // namespace ea
