#pragma once

// What is in common/ compiles for the host and, under nvcc, for the device. No torch types here.
#if defined(__CUDACC__)
#define EA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EA_HOST_DEVICE inline __attribute__((always_inline))
#endif
