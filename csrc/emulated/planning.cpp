#include "cuda/planning_tensors.h"
#include "emulated/ops.h"

namespace ea::cuda::emulated {
namespace {

struct PlanningMachine {
  int64_t num_processors, bytes, seed;

  int64_t processors() const { return num_processors; }
  int64_t shared_memory() const { return bytes; }

  template <typename Kernel>
  void launch(int64_t blocks, int threads, int64_t shared_bytes,
              const typename Kernel::Call& call) const {
    emulated::launch(int(blocks), threads, shared_bytes, uint64_t(seed),
                     [&](int block, char* shared) { Kernel::run(call, block, shared); });
  }
};

}  // namespace

Tensor lsh_codes(
    Tensor x, Tensor normals, int64_t bits, bool center, int64_t leaf, int64_t first, bool own,
    int64_t seed) {
  const PlanningMachine machine{1, 0, seed};
  return lsh_codes_on(machine, x, normals, bits, center, leaf, first, own);
}

std::tuple<Tensor, Tensor> segment_order(
    Tensor codes, int64_t bins, std::vector<int64_t> sizes, int64_t tokens, int64_t first,
    int64_t processors, int64_t shared_memory, int64_t seed) {
  const PlanningMachine machine{processors, shared_memory, seed};
  return segment_order_on(machine, codes, bins, sizes, tokens, first);
}

}  // namespace ea::cuda::emulated
