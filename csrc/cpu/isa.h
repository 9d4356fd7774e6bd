#pragma once

// The instruction sets that kernels are compiled for, and what all of them share.

#include <cstdint>

namespace ea::cpu {

// A 16-bit floating point number as it lies in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class Isa { baseline, avx2, avx512 };  // each holds the ones before it

// The widest one that this processor has.
inline Isa best_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::baseline;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::avx512 : Isa::avx2;
  }();
  return isa;
#else
  return Isa::baseline;
#endif
}

inline const char* name(Isa isa) {
  return isa == Isa::avx512 ? "AVX-512" : isa == Isa::avx2 ? "AVX2" : "baseline";
}

}  // namespace ea::cpu
