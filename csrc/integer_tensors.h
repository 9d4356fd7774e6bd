#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "common/integers.h"

namespace ea {
namespace {  // What holds tensors has no visibility to give.

// A tensor of lengths, pages or heads, or row `row` of it.
inline Integers integers(const torch::stable::Tensor& tensor, int64_t row = 0) {
  using torch::headeronly::ScalarType;
  const bool wide = tensor.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || tensor.scalar_type() == ScalarType::Int,
                  "a tensor of lengths, pages or heads has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), "; pass int32 or int64.");
  const int64_t offset = tensor.dim() == 2 ? row * tensor.stride(0) : 0;
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  return {data + offset * (wide ? 8 : 4), tensor.stride(-1), wide};
}

}  // namespace
}  // namespace ea
