#pragma once

#include "cuda/machine.h"

// What counting asks of the machine beside machine.h.

namespace ea::cuda {

#if defined(__CUDACC__)

// Which lanes pass the same value.
EA_DEVICE uint32_t lanes_with(int32_t value) { return __match_any_sync(0xffffffffu, value); }

EA_DEVICE void add(int32_t* at, int32_t value) { atomicAdd(at, value); }

#else

inline uint32_t lanes_with(int32_t value) {
  uint32_t lanes = 0;
  emulated::meet("lanes_with", &value, &lanes, [](const void* const* ins, void* const* outs) {
    const auto value_of = [&](int lane) { return *static_cast<const int32_t*>(ins[lane]); };
    for (int to = 0; to < 32; ++to) {
      uint32_t same = 0;
      for (int i = 0; i < 32; ++i) same |= uint32_t(value_of(i) == value_of(to)) << i;
      *static_cast<uint32_t*>(outs[to]) = same;
    }
  });
  return lanes;
}

inline void add(int32_t* at, int32_t value) { *at += value; }

#endif

}  // namespace ea::cuda
