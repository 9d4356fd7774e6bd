#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

// The CUDA ops on tensors of the CPU, run by the emulated machine, in an order that `seed` shuffles. For
// tests.

namespace ea::cuda::emulated {

torch::stable::Tensor lsh_codes(
    torch::stable::Tensor x, torch::stable::Tensor normals, int64_t bits, bool center,
    int64_t leaf, int64_t first, bool own, int64_t seed);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> segment_order(
    torch::stable::Tensor codes, int64_t bins, std::vector<int64_t> sizes, int64_t tokens,
    int64_t first, int64_t processors, int64_t shared_memory, int64_t seed);

}  // namespace ea::cuda::emulated
