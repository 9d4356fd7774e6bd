#pragma once

// The instruction sets that kernels are compiled for, and what all of them share.

#include <cstdint>
#include <type_traits>

namespace ea::cpu {

// A 16-bit floating point number as it lies in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// What values are computed in.
template <typename Value>
using RealOf = std::conditional_t<std::is_same_v<Value, double>, double, float>;

enum class Isa { baseline, avx2, avx512, avx512_bf16 };  // each holds the ones before it

inline constexpr Isa kEveryIsa[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

// The widest one that this processor has.
inline Isa best_isa() {
#if defined(__x86_64__)
  static const Isa isa = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c")) {
      return Isa::baseline;
    }
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx512) return Isa::avx2;
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  }();
  return isa;
#else
  return Isa::baseline;
#endif
}

inline const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16: return "AVX-512 with bf16";
    case Isa::avx512: return "AVX-512";
    case Isa::avx2: return "AVX2";
    default: return "baseline";
  }
}

}  // namespace ea::cpu
