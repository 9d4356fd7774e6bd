#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/sort_block.h"

// Tensors to the plain data that kernels are told, for any machine that runs them: a device, or the
// emulated one. A machine has so many processors() and bytes of shared_memory() for a block, and
// launch<Kernel>(blocks, threads, shared_bytes, call).

namespace ea::cuda {
namespace {  // What holds tensors has no visibility to give.

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Machine>
std::tuple<Tensor, Tensor> segment_order_on(
    const Machine& machine, Tensor codes, int64_t bins, const std::vector<int64_t>& sizes,
    int64_t tokens, int64_t first) {
  STD_TORCH_CHECK(codes.dim() == 3 && codes.scalar_type() == ScalarType::Int && tokens > 0 &&
                      codes.size(2) % tokens == 0,
                  "segment_order got codes that are not int32 (batch, heads, rows), or rows that are ",
                  "not a multiple of the tokens.");
  codes = torch::stable::contiguous(codes);
  const int64_t batch = codes.size(0), heads = codes.size(1), rows = codes.size(2);
  const int64_t levels = sizes.size();
  Tensor order = torch::stable::new_empty(codes, {batch, heads, levels, rows});
  Tensor rank = torch::stable::new_empty(codes, {batch, heads, levels, rows});
  if (order.numel() == 0) return {order, rank};

  SortCall call{{}, static_cast<const int32_t*>(codes.const_data_ptr()),
                static_cast<int32_t*>(order.mutable_data_ptr()),
                static_cast<int32_t*>(rank.mutable_data_ptr())};
  const std::string refusal =
      plan_segment_sort(sizes, tokens, rows / tokens, first, bins, batch * heads,
                        machine.processors(), machine.shared_memory(), &call.sort);
  STD_TORCH_CHECK(refusal.empty(), "segment_order ", refusal);
  machine.template launch<SortBlock>(batch * heads * call.sort.tiles, 32 * call.sort.warps,
                                     call.sort.shared_words() * sizeof(int32_t), call);
  return {order, rank};
}

}  // namespace
}  // namespace ea::cuda
