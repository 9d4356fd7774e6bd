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

std::tuple<torch::stable::Tensor, torch::stable::Tensor> hyper_attention(
    torch::stable::Tensor query, torch::stable::Tensor key, torch::stable::Tensor value,
    torch::stable::Tensor key_order, torch::stable::Tensor key_rank,
    torch::stable::Tensor band_start, torch::stable::Tensor band_end,
    torch::stable::Tensor block_rows, torch::stable::Tensor block_first,
    torch::stable::Tensor block_sample, torch::stable::Tensor sample_keys,
    torch::stable::Tensor sample_log_weight, bool causal, int64_t leaf_size, int64_t window,
    int64_t sinks, int64_t block_size, bool samples_by_leaf, double scale);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
hyper_attention_backward(
    torch::stable::Tensor grad_out, std::optional<torch::stable::Tensor> grad_lse,
    torch::stable::Tensor query, torch::stable::Tensor key, torch::stable::Tensor value,
    torch::stable::Tensor out, torch::stable::Tensor lse, torch::stable::Tensor key_order,
    torch::stable::Tensor key_rank, torch::stable::Tensor band_start,
    torch::stable::Tensor band_end, torch::stable::Tensor block_rows,
    torch::stable::Tensor block_first, torch::stable::Tensor block_sample,
    torch::stable::Tensor sample_keys, torch::stable::Tensor sample_log_weight, bool causal,
    int64_t leaf_size, int64_t window, int64_t sinks, int64_t block_size, bool samples_by_leaf,
    double scale);

torch::stable::Tensor lsh_codes(
    torch::stable::Tensor x, torch::stable::Tensor normals, int64_t bits, bool center,
    int64_t leaf, int64_t first, bool own);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> segment_order(
    torch::stable::Tensor codes, int64_t bins, std::vector<int64_t> sizes, int64_t tokens,
    int64_t first);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> selective_decode(
    torch::stable::Tensor query, torch::stable::Tensor key_cache,
    torch::stable::Tensor value_cache, torch::stable::Tensor cache_lengths,
    std::optional<torch::stable::Tensor> block_table, std::optional<torch::stable::Tensor> q_to_k,
    std::optional<torch::stable::Tensor> q_to_v, std::optional<int64_t> window_left, double scale,
    double softcap, std::optional<int64_t> top_values, double dropped_mass);

}  // namespace ea::cpu
