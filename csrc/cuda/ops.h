#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

// The native CUDA ops. Their schemas are in ../registration.cpp, what they cover is in
// efficient_attn/ops/cuda.py.

namespace ea::cuda {

torch::stable::Tensor lsh_codes(
    torch::stable::Tensor x, torch::stable::Tensor normals, int64_t bits, bool center,
    int64_t leaf, int64_t first, bool own);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> segment_order(
    torch::stable::Tensor codes, int64_t bins, std::vector<int64_t> sizes, int64_t tokens,
    int64_t first);

}  // namespace ea::cuda
