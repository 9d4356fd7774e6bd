#include "cuda/planning_tensors.h"

#include "cuda/device.cuh"
#include "cuda/ops.h"

namespace ea::cuda {
namespace {

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kMostThreads, 2)
    run_block(const __grid_constant__ typename Kernel::Call call) {
  extern __shared__ __align__(16) char shared[];
  Kernel::run(call, blockIdx.x, shared);
}

// The device of a tensor, as planning_tensors.h wants to see it.
struct PlanningDevice : Device {
  using Device::Device;

  int64_t processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int64_t shared_memory() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  template <typename Kernel>
  void launch(int64_t blocks, int threads, int64_t shared_bytes,
              const typename Kernel::Call& call) const {
    Device::launch(run_block<Kernel>, blocks, threads, shared_bytes, call);
  }
};

}  // namespace

Tensor lsh_codes(
    Tensor x, Tensor normals, int64_t bits, bool center, int64_t leaf, int64_t first, bool own) {
  return lsh_codes_on(PlanningDevice(x), x, normals, bits, center, leaf, first, own);
}

std::tuple<Tensor, Tensor> segment_order(
    Tensor codes, int64_t bins, std::vector<int64_t> sizes, int64_t tokens, int64_t first) {
  return segment_order_on(PlanningDevice(codes), codes, bins, sizes, tokens, first);
}

}  // namespace ea::cuda
