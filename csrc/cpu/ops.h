#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

// The native CPU ops. Their schemas are in registration.cpp, what they compute is in the Python
// module of the same name under efficient_attn/reference.

namespace ea::cpu {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> merge_states(
    std::vector<torch::stable::Tensor> outs, std::vector<torch::stable::Tensor> lses);

}  // namespace ea::cpu
