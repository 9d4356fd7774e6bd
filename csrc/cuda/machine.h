#pragma once

#include <cstdint>

// What a kernel asks of the machine it runs on: threads, exchange in a warp, copies that are waited for,
// tensor cores. A kernel that asks for nothing else compiles for the host as well, where
// emulated/machine.h gives the same answers, thread by thread, so that its own source is tested without
// a device.

namespace ea::cuda {

// Sixteen bytes, the unit of copies and of what ldmatrix reads.
struct alignas(16) Granule {
  uint32_t words[4];
};

struct alignas(16) Float4 {
  float x[4];
};
struct alignas(8) Float2 {
  float x[2];
};

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace ea::cuda

#if defined(__CUDACC__)
#define EA_DEVICE __device__ __forceinline__
#include "cuda/machine.cuh"
#else
#define EA_DEVICE inline
#include "emulated/machine.h"
#endif
