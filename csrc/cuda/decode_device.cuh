#pragma once

#include "cuda/decode_merge.h"
#include "cuda/device.cuh"

namespace ea::cuda {
namespace {

template <typename Kernel>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    run_block(const __grid_constant__ DecodeCall call) {
  extern __shared__ __align__(16) char shared[];
  Kernel::run(call, blockIdx.x, shared);
}

// The device of a tensor, as decode_tensors.h wants to see it.
struct DecodeDevice : Device {
  using Device::Device;

  template <typename Kernel>
  int64_t blocks() const {
    return resident_blocks(run_block<Kernel>, kDecodeThreads, sizeof(typename Kernel::Shared));
  }

  template <typename Kernel>
  void launch(const DecodeCall& call) const {
    Device::launch(run_block<Kernel>, call.num_blocks(), kDecodeThreads,
                   sizeof(typename Kernel::Shared), call);
  }
};

}  // namespace
}  // namespace ea::cuda
