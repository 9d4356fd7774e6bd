#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/hash_block.h"
#include "cuda/sort_block.h"

// Tensors to the plain data that kernels are told, for any machine that runs them: a device, or the
// emulated one. A machine has so many processors() and bytes of shared_memory() for a block, and
// launch<Kernel>(blocks, threads, shared_bytes, call).

namespace ea::cuda {
namespace {  // What holds tensors has no visibility to give.

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Element, typename Machine>
void hash_on(const Machine& machine, int64_t heads, const HashCall& call) {
  using Project = ProjectBlock<Element>;
  machine.template launch<Project>(heads * call.parts.parts, Project::kMostThreads,
                                   Project::shared_bytes(call), call);
  if (!call.center) return;
  machine.template launch<MeansBlock>(heads, MeansBlock::kMostThreads,
                                      MeansBlock::shared_bytes(call), call);
  machine.template launch<CodesBlock>(heads * CodesBlock::blocks_of_head(call),
                                      CodesBlock::kMostThreads, 0, call);
}

template <typename Machine>
Tensor lsh_codes_on(
    const Machine& machine, const Tensor& x, Tensor normals, int64_t bits, bool center,
    int64_t leaf, int64_t first, bool own) {
  STD_TORCH_CHECK(x.dim() == 4 && normals.scalar_type() == ScalarType::Float &&
                      normals.dim() == 2 && normals.size(0) == x.size(3) &&
                      normals.size(1) == kMostBits,
                  "lsh_codes got tokens and normals that do not fit together; pass (batch, heads, ",
                  "tokens, dim) and float32 (dim, ", kMostBits, ").");
  const int64_t tokens = x.size(2), heads = x.size(0) * x.size(1), most = 1 << 30;
  STD_TORCH_CHECK(bits >= 1 && bits <= kMostBits && leaf >= 0 && leaf < most &&
                      tokens + std::abs(first) < most,
                  "lsh_codes got ", bits, " bits, leaves of ", leaf, " and ", tokens,
                  " tokens from ", first, " on; pass 1 to ", kMostBits, " bits, and less than 2**30.");
  normals = torch::stable::contiguous(normals);
  const int64_t size = x.element_size(), granule = sizeof(Granule);
  bool aligned = x.stride(3) == 1 && x.size(3) * size % granule == 0;
  for (int axis = 0; axis < 3; ++axis) aligned &= x.stride(axis) * size % granule == 0;
  for (const void* data : {x.const_data_ptr(), normals.const_data_ptr()}) {
    aligned &= reinterpret_cast<uintptr_t>(data) % granule == 0;
  }
  STD_TORCH_CHECK(aligned, "lsh_codes got tokens or normals that do not all begin and end at ",
                  "multiples of 16 bytes.");

  Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1), tokens}, ScalarType::Int);
  if (codes.numel() == 0) return codes;
  HashCall call{x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), int32_t(x.size(1)),
                int32_t(x.size(3)), int32_t(bits),
                static_cast<const Float4*>(normals.const_data_ptr()),
                HashParts::make(int32_t(tokens), int32_t(first), int32_t(center ? leaf : 0)),
                center, own, static_cast<int32_t*>(codes.mutable_data_ptr()), nullptr, nullptr,
                nullptr};
  std::vector<Tensor> held;
  const auto room = [&](int64_t numbers) {
    held.push_back(torch::stable::new_empty(normals, {center ? heads * numbers : 0}));
    return static_cast<float*>(held.back().mutable_data_ptr());
  };
  call.projections = room(bits * tokens);
  call.sums = room(call.parts.parts * kMostBits);
  call.means = room(call.parts.runs * kMostBits);
  switch (x.scalar_type()) {
    case ScalarType::Float: hash_on<float>(machine, heads, call); break;
    case ScalarType::BFloat16: hash_on<BFloat16>(machine, heads, call); break;
    case ScalarType::Half: hash_on<Half>(machine, heads, call); break;
    default:
      STD_TORCH_CHECK(false, "lsh_codes got ", torch::headeronly::toString(x.scalar_type()),
                      "; pass float16, bfloat16 or float32.");
  }
  return codes;
}

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
