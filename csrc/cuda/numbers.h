#pragma once

#include <cstring>

#include "cuda/machine.h"

// Numbers of tokens, as they lie in granules.

namespace ea::cuda {

template <typename Element>
constexpr int kNumbers = int(sizeof(Granule) / sizeof(Element));  // in a granule

EA_DEVICE float from_bits(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

EA_DEVICE uint16_t half_word(const Granule& granule, int i) {
  return uint16_t(granule.words[i / 2] >> (16 * (i % 2)));
}

EA_DEVICE float number_of(const Granule& granule, int i, float) {
  return from_bits(granule.words[i]);
}

EA_DEVICE float number_of(const Granule& granule, int i, BFloat16) {
  return from_bits(uint32_t(half_word(granule, i)) << 16);
}

EA_DEVICE float number_of(const Granule& granule, int i, Half) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(half_word(granule, i)));
#else
  return emulated::to_float(half_word(granule, i), Half{});
#endif
}

}  // namespace ea::cuda
