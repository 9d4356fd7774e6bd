#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

// The machine of machine.h that is there. Copies and products need compute capability 8.0.

namespace ea::cuda {

EA_DEVICE int thread() { return int(threadIdx.x); }
EA_DEVICE int lane() { return thread() % 32; }
EA_DEVICE int warp() { return thread() / 32; }

// Makes the compiler compute anew what depends on x, rather than keep it in registers.
EA_DEVICE void forget(int& x) { asm volatile("" : "+r"(x)); }

EA_DEVICE void sync_block() { __syncthreads(); }
EA_DEVICE void sync_warp() { __syncwarp(); }

template <typename T>
EA_DEVICE T shuffle(T value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

EA_DEVICE uint32_t ballot(bool condition) { return __ballot_sync(0xffffffffu, condition); }

EA_DEVICE float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

EA_DEVICE uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// Begins to copy a granule into shared memory, past the first-level cache; zeros where not `inside`.
EA_DEVICE void copy_async(Granule* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}

EA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all copies of this thread but those of the last kPending commits.
template <int kPending>
EA_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

EA_DEVICE void load_matrices(uint32_t (&to)[4], const Granule* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

EA_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const Granule* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

template <typename Element>
EA_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0,
                            uint32_t right1);

#define EA_MULTIPLY_ADD(Element, dtype)                                                           \
  template <>                                                                                     \
  EA_DEVICE void multiply_add<Element>(float (&sum)[4], const uint32_t (&left)[4],                \
                                       uint32_t right0, uint32_t right1) {                        \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." dtype "." dtype                                  \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                  \
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));      \
  }
EA_MULTIPLY_ADD(BFloat16, "bf16")
EA_MULTIPLY_ADD(Half, "f16")
#undef EA_MULTIPLY_ADD

// Two numbers side by side, the first in the lower half.
template <typename Element>
EA_DEVICE uint32_t pack(float first, float second);

template <>
EA_DEVICE uint32_t pack<BFloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
EA_DEVICE uint32_t pack<Half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// What other blocks have written before a fence is read from behind the first-level cache.
EA_DEVICE void fence() { __threadfence(); }
EA_DEVICE float load_fresh(const float* from) { return __ldcg(from); }
EA_DEVICE Float4 load_fresh(const Float4* from) {
  const float4 x = __ldcg(reinterpret_cast<const float4*>(from));
  return {x.x, x.y, x.z, x.w};
}

EA_DEVICE uint64_t swap_if_equal(uint64_t* word, uint64_t expected, uint64_t wanted) {
  return atomicCAS(reinterpret_cast<unsigned long long*>(word), expected, wanted);
}

}  // namespace ea::cuda
