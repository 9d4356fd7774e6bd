#pragma once

#include <cstdint>

// What is in common/ compiles for the host and, under nvcc, for the device. No torch types here.
#if defined(__CUDACC__)
#define EA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace ea {

EA_HOST_DEVICE int popcount(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

template <typename Integer>
EA_HOST_DEVICE Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

}  // namespace ea
