// Compiles a kernel once per instruction set, and picks the best one when the process runs:
//
//   #define EA_BODY "cpu/some_kernel.inl"
//   #include "cpu/for_each_isa.h"
//   ...
//   EA_DISPATCH(some_kernel)(arguments);
//
// The body is included inside namespace ea::cpu::{baseline, avx2, avx512, avx512_bf16}, after
// cpu/vector.inl, whose vectors are as wide as the registers of that set; EA_BF16_DOT says whether it
// multiplies bf16. A body must include nothing itself: an inline
// function of the standard library compiled under a wider set could win at link time and then run
// on a processor that lacks it. What it needs is included here.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/online_softmax.h"
#include "cpu/isa.h"

#if defined(__clang__)
#define EA_PRAGMA(text) _Pragma(#text)
#define EA_BEGIN_TARGET(features) \
  EA_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define EA_END_TARGET _Pragma("clang attribute pop")
#else
#define EA_PRAGMA(text) _Pragma(#text)
#define EA_BEGIN_TARGET(features) _Pragma("GCC push_options") EA_PRAGMA(GCC target(features))
#define EA_END_TARGET _Pragma("GCC pop_options")
#endif

namespace ea::cpu::baseline {
#define EA_BF16_DOT 0
#define EA_VECTOR_BYTES 16
#include "cpu/vector.inl"
#include EA_BODY
#undef EA_VECTOR_BYTES
}  // namespace ea::cpu::baseline

#if defined(__x86_64__)

EA_BEGIN_TARGET("avx2,fma,f16c")
namespace ea::cpu::avx2 {
#define EA_VECTOR_BYTES 32
#include "cpu/vector.inl"
#include EA_BODY
#undef EA_VECTOR_BYTES
}  // namespace ea::cpu::avx2
EA_END_TARGET

EA_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace ea::cpu::avx512 {
#define EA_VECTOR_BYTES 64
#include "cpu/vector.inl"
#include EA_BODY
#undef EA_VECTOR_BYTES
}  // namespace ea::cpu::avx512
EA_END_TARGET

EA_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace ea::cpu::avx512_bf16 {
#undef EA_BF16_DOT
#define EA_BF16_DOT 1
#define EA_VECTOR_BYTES 64
#include "cpu/vector.inl"
#include EA_BODY
#undef EA_VECTOR_BYTES
}  // namespace ea::cpu::avx512_bf16
EA_END_TARGET

#define EA_SELECT(isa, ...)                                                    \
  ((isa) == ::ea::cpu::Isa::avx512_bf16 ? ::ea::cpu::avx512_bf16::__VA_ARGS__ \
   : (isa) == ::ea::cpu::Isa::avx512    ? ::ea::cpu::avx512::__VA_ARGS__      \
   : (isa) == ::ea::cpu::Isa::avx2      ? ::ea::cpu::avx2::__VA_ARGS__        \
                                        : ::ea::cpu::baseline::__VA_ARGS__)

#else

#define EA_SELECT(isa, ...) (::ea::cpu::baseline::__VA_ARGS__)

#endif

#undef EA_BF16_DOT
#define EA_DISPATCH(...) EA_SELECT(::ea::cpu::best_isa(), __VA_ARGS__)
