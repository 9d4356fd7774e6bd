#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

// The CUDA ops on tensors of the CPU, run by the emulated machine in an order that `seed` shuffles, as if it
// ran `blocks` blocks at a time. For tests.

namespace ea::cuda::emulated {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_decode(
    torch::stable::Tensor query, torch::stable::Tensor key_cache,
    torch::stable::Tensor value_cache, torch::stable::Tensor cache_lengths,
    std::optional<torch::stable::Tensor> block_table, std::optional<torch::stable::Tensor> q_to_k,
    std::optional<torch::stable::Tensor> q_to_v, std::optional<int64_t> window_left, double scale,
    double softcap, int64_t blocks, int64_t seed);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> mla_decode(
    torch::stable::Tensor q_latent, torch::stable::Tensor q_rope, torch::stable::Tensor cache,
    torch::stable::Tensor cache_lengths, std::optional<torch::stable::Tensor> block_table,
    double scale, int64_t blocks, int64_t seed);

torch::stable::Tensor lsh_codes(
    torch::stable::Tensor x, torch::stable::Tensor normals, int64_t bits, bool center,
    int64_t leaf, int64_t first, bool own, int64_t seed);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> segment_order(
    torch::stable::Tensor codes, int64_t bins, std::vector<int64_t> sizes, int64_t tokens,
    int64_t first, int64_t processors, int64_t shared_memory, int64_t seed);

}  // namespace ea::cuda::emulated
