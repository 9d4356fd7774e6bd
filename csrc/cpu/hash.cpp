#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "common/counting_sort.h"
#include "common/lsh.h"
#include "cpu/hyper_plan.h"
#include "cpu/ops.h"

namespace ea::cpu {
namespace {
// A row is multiplied by all the normals that there could be, which fill whole vectors.
constexpr int64_t kProjections = 16;
}  // namespace
}  // namespace ea::cpu

#define EA_BODY "cpu/hash.inl"
#include "cpu/for_each_isa.h"

namespace ea::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tokens are added up in parts of so many, where no leaf says otherwise.
constexpr int64_t kPart = 512;

struct HashCall {
  int64_t heads, tokens, dim, bits;
  const float* normals;
  bool center;
  int64_t leaf;   // means are of the leaves that are past; 0 for one mean of all tokens
  int64_t first;  // position of token 0
  bool own;       // whether its own leaf is past for a token

  // The parts of a head: [starts[p], starts[p + 1]) are the tokens of one leaf.
  std::vector<int64_t> parts() const {
    std::vector<int64_t> starts{0};
    const bool leaves = center && leaf > 0;
    while (starts.back() < tokens) {
      const int64_t position = std::max<int64_t>(first + starts.back(), 0);
      const int64_t next = leaves ? (position / leaf + 1) * leaf - first : starts.back() + kPart;
      starts.push_back(std::min(next, tokens));
    }
    return starts;
  }
};

using Means = std::vector<double>;  // (heads, parts, kProjections)

// What the projections of each part are compared with, from the sums of the parts.
void sums_to_means(const HashCall& call, const std::vector<int64_t>& starts, Means& sums) {
  const int64_t parts = starts.size() - 1;
  for (int64_t h = 0; h < call.heads; ++h) {
    double* head = sums.data() + h * parts * kProjections;
    double past[kProjections] = {};
    for (int64_t p = 0; p < parts; ++p) {
      for (int64_t j = 0; j < kProjections; ++j) {
        const double before = past[j];
        past[j] += head[p * kProjections + j];
        const int64_t count = call.own ? starts[p + 1] : starts[p];
        head[p * kProjections + j] = (call.own ? past[j] : before) / std::max<int64_t>(count, 1);
      }
    }
    for (int64_t p = 0; call.leaf == 0 && p < parts; ++p) {
      for (int64_t j = 0; j < kProjections; ++j) {
        head[p * kProjections + j] = past[j] / call.tokens;
      }
    }
  }
}

template <typename Value>
Tensor hash(const Tensor& x, const HashCall& call) {
  const std::vector<int64_t> starts = call.parts();
  const int64_t parts = starts.size() - 1, heads_of_sample = x.size(1);
  Tensor codes = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)}, ScalarType::Int);
  auto* code = static_cast<int32_t*>(codes.mutable_data_ptr());
  const auto* data = static_cast<const Value*>(x.const_data_ptr());
  std::unique_ptr<float[]> projections(new float[call.heads * call.tokens * kProjections]);
  Means means(call.heads * parts * kProjections, 0.0);

  const auto for_each_part = [&](const auto& visit) {
    torch::stable::parallel_for(0, call.heads * parts, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> rows(std::is_same_v<Value, float> ? 0 : kPart * (call.dim + 16));
      for (int64_t i = begin; i < end; ++i) visit(i / parts, i % parts, rows);
    });
  };
  for_each_part([&](int64_t h, int64_t p, std::vector<float>& rows) {
    const Value* head = data + h / heads_of_sample * x.stride(0) + h % heads_of_sample * x.stride(1);
    double* sum = means.data() + (h * parts + p) * kProjections;
    for (int64_t from = starts[p]; from < starts[p + 1]; from += kPart) {
      const int64_t count = std::min(kPart, starts[p + 1] - from);
      float* out = projections.get() + (h * call.tokens + from) * kProjections;
      if constexpr (std::is_same_v<Value, float>) {
        EA_DISPATCH(project_rows)(head + from * x.stride(2), x.stride(2), count, call.dim,
                                  call.normals, out);
      } else {
        const int64_t step = call.dim + 16;
        for (int64_t i = 0; i < count; ++i) {
          EA_DISPATCH(to_float<Value>)(head + (from + i) * x.stride(2), call.dim,
                                       rows.data() + i * step);
        }
        EA_DISPATCH(project_rows)(rows.data(), step, count, call.dim, call.normals, out);
      }
      for (int64_t i = 0; call.center && i < count; ++i) {
        for (int64_t j = 0; j < kProjections; ++j) sum[j] += out[i * kProjections + j];
      }
    }
  });
  if (call.center) sums_to_means(call, starts, means);
  for_each_part([&](int64_t h, int64_t p, std::vector<float>&) {
    float thresholds[kProjections];
    std::copy_n(means.data() + (h * parts + p) * kProjections, kProjections, thresholds);
    for (int64_t i = h * call.tokens + starts[p]; i < h * call.tokens + starts[p + 1]; ++i) {
      code[i] = int32_t(sign_code(projections.get() + i * kProjections, thresholds, int(call.bits)));
    }
  });
  return codes;
}

}  // namespace

Tensor lsh_codes(
    Tensor x, Tensor normals, int64_t bits, bool center, int64_t leaf, int64_t first, bool own) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && normals.scalar_type() == ScalarType::Float &&
                      normals.dim() == 2 && normals.size(0) == x.size(3) &&
                      normals.size(1) == kProjections,
                  "lsh_codes got tokens and normals that do not fit together; pass (batch, heads, ",
                  "tokens, dim) and float32 (dim, ", kProjections, ").");
  STD_TORCH_CHECK(bits >= 1 && bits <= kProjections && leaf >= 0, "lsh_codes got ", bits,
                  " bits and leaves of ", leaf, "; pass 1 to ", kProjections, " and 0 or more.");
  if (x.stride(3) != 1) x = torch::stable::contiguous(x);
  normals = torch::stable::contiguous(normals);
  const HashCall call{x.size(0) * x.size(1), x.size(2), x.size(3), bits,
                      static_cast<const float*>(normals.const_data_ptr()), center, leaf, first, own};
  switch (x.scalar_type()) {
    case ScalarType::Float: return hash<float>(x, call);
    case ScalarType::BFloat16: return hash<BFloat16>(x, call);
    case ScalarType::Half: return hash<Half>(x, call);
    case ScalarType::Double: return hash<double>(x, call);
    default: break;
  }
  STD_TORCH_CHECK(false, "lsh_codes got ", torch::headeronly::toString(x.scalar_type()),
                  "; pass float16, bfloat16, float32 or float64.");
}

std::tuple<Tensor, Tensor> segment_order(
    Tensor codes, int64_t bins, std::vector<int64_t> sizes, int64_t tokens, int64_t first) {
  STD_TORCH_CHECK(codes.is_cpu() && codes.dim() == 3 && codes.scalar_type() == ScalarType::Int &&
                      tokens > 0 && codes.size(2) % tokens == 0,
                  "segment_order got codes that are not int32 (batch, heads, rows) on the CPU, or ",
                  "rows that are not a multiple of the tokens.");
  for (const int64_t size : sizes) STD_TORCH_CHECK(size > 0, "a segment has size ", size, ".");
  codes = torch::stable::contiguous(codes);
  const int64_t batch = codes.size(0), heads = codes.size(1), rows = codes.size(2);
  const int64_t levels = sizes.size();
  const auto* code = static_cast<const int32_t*>(codes.const_data_ptr());
  Tensor order = torch::stable::new_empty(codes, {batch, heads, levels, rows});
  Tensor rank = torch::stable::new_empty(codes, {batch, heads, levels, rows});
  auto* order_at = static_cast<int32_t*>(order.mutable_data_ptr());
  auto* rank_at = static_cast<int32_t*>(rank.mutable_data_ptr());
  int32_t least = 0, most = 0;
  for (int64_t i = 0; i < batch * heads * rows; ++i) {
    least = std::min(least, code[i]);
    most = std::max(most, code[i]);
  }
  STD_TORCH_CHECK(least >= 0 && most < bins, "segment_order got a code of ",
                  least < 0 ? least : most, "; pass codes of 0 to ", bins - 1, ".");
  // By code first, which is the same at every level; then by segment, which keeps that order.
  std::unique_ptr<int32_t[]> by_code(new int32_t[batch * heads * rows]);
  torch::stable::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> starts(bins + 1);
    for (int64_t h = begin; h < end; ++h) {
      counting_sort(
          rows, bins, [](int64_t i) { return int32_t(i); },
          [&](int32_t row) { return code[h * rows + row]; }, starts.data(),
          by_code.get() + h * rows);
    }
  });
  torch::stable::parallel_for(0, batch * heads * levels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* sorted = by_code.get() + i / levels * rows;
      const int64_t size = sizes[i % levels], lowest = HyperPlan::floor_div(first, size);
      const int64_t segments = HyperPlan::floor_div(first + tokens - 1, size) - lowest + 1;
      int32_t *to = order_at + i * rows, *rank_to = rank_at + i * rows;
      if (segments == 1) {
        std::copy_n(sorted, rows, to);
      } else {
        std::vector<int32_t> starts(segments + 1), segment(tokens);
        for (int64_t t = 0; t < tokens; ++t) segment[t] = int32_t(HyperPlan::floor_div(first + t, size) - lowest);
        counting_sort(
            rows, segments, [&](int64_t at) { return sorted[at]; },
            [&](int32_t row) { return segment[row % tokens]; }, starts.data(), to);
      }
      for (int64_t at = 0; at < rows; ++at) rank_to[to[at]] = int32_t(at);
    }
  });
  return {order, rank};
}

}  // namespace ea::cpu
