#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

// The native CPU ops. Their schemas are in registration.cpp, what they compute is in the Python
// module of the same name under efficient_attn/reference.

namespace ea::cpu {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> merge_states(
    std::vector<torch::stable::Tensor> outs, std::vector<torch::stable::Tensor> lses);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_decode(
    torch::stable::Tensor query, torch::stable::Tensor key_cache,
    torch::stable::Tensor value_cache, torch::stable::Tensor cache_lengths,
    std::optional<torch::stable::Tensor> block_table, std::optional<torch::stable::Tensor> q_to_k,
    std::optional<torch::stable::Tensor> q_to_v, std::optional<int64_t> window_left, double scale,
    double softcap);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> mla_decode(
    torch::stable::Tensor q_latent, torch::stable::Tensor q_rope, torch::stable::Tensor cache,
    torch::stable::Tensor cache_lengths, std::optional<torch::stable::Tensor> block_table,
    double scale);

}  // namespace ea::cpu
