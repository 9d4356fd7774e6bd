#include "cpu/merge_states.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/ops.h"
#include "cpu/rows.h"

#define EA_BODY "cpu/merge_states.inl"
#include "cpu/for_each_isa.h"

namespace ea::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this much work for a thread, waking another one costs more than it brings.
constexpr int64_t kValuesPerTask = 32768;

void check(const std::vector<Tensor>& outs, const std::vector<Tensor>& lses) {
  STD_TORCH_CHECK(!outs.empty() && outs.size() == lses.size(), "merge_states got ", outs.size(),
                  " outs and ", lses.size(), " lses; pass one lse for each out, and at least one.");
  for (size_t s = 0; s < outs.size(); ++s) {
    const auto &shape = outs[s].sizes(), &first = outs[0].sizes(), &lse_shape = lses[s].sizes();
    bool same = shape.size() >= 1 && shape.size() == first.size() &&
                lse_shape.size() + 1 == shape.size() &&
                outs[s].scalar_type() == outs[0].scalar_type() &&
                lses[s].scalar_type() == lses[0].scalar_type();
    for (size_t d = 0; same && d < shape.size(); ++d) {
      same = shape[d] == first[d] && (d + 1 == shape.size() || lse_shape[d] == shape[d]);
    }
    STD_TORCH_CHECK(same, "part ", s, " of merge_states differs from part 0 in shape or dtype, or ",
                    "its lse is not of its shape without the last dimension.");
  }
  const ScalarType dtype = outs[0].scalar_type(), lse_dtype = lses[0].scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "merge_states got outs of ", torch::headeronly::toString(dtype),
                  "; pass float16, bfloat16, float32 or float64.");
  STD_TORCH_CHECK(lse_dtype == ScalarType::Float || lse_dtype == ScalarType::Double,
                  "merge_states got lses of ", torch::headeronly::toString(lse_dtype),
                  "; pass float32 or float64.");
}

template <typename Value, typename Lse>
void merge(
    const std::vector<Tensor>& outs, const std::vector<Tensor>& lses, const Tensor& out,
    const Tensor& lse) {
  using Run = MergeRun<Value, Lse>;
  const int64_t count = outs.size(), dim = out.size(-1);
  std::vector<Tensor> tensors(outs);
  tensors.insert(tensors.end(), lses.begin(), lses.end());
  tensors.push_back(out);
  tensors.push_back(lse);

  std::vector<Axis> axes;
  for (int64_t d = 0; d < lse.dim(); ++d) {
    Axis axis{lse.size(d), {}};
    for (const Tensor& tensor : tensors) axis.steps.push_back(tensor.stride(d));
    axes.push_back(std::move(axis));
  }
  const RowWalk walk(std::move(axes));

  std::vector<const Value*> parts;
  std::vector<const Lse*> part_lses;
  std::vector<int64_t> part_steps, lse_steps;
  for (int64_t s = 0; s < count; ++s) {
    parts.push_back(static_cast<const Value*>(outs[s].const_data_ptr()));
    part_lses.push_back(static_cast<const Lse*>(lses[s].const_data_ptr()));
    part_steps.push_back(walk.step(s));
    lse_steps.push_back(walk.step(count + s));
  }
  auto* const out_data = static_cast<Value*>(out.mutable_data_ptr());
  auto* const lse_data = static_cast<Lse*>(lse.mutable_data_ptr());

  const int64_t grain = std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, count * dim));
  torch::stable::parallel_for(0, walk.rows(), grain, [&](int64_t begin, int64_t end) {
    std::vector<const Value*> at(count);
    std::vector<const Lse*> lse_at(count);
    std::vector<typename Run::Real> weights(count);
    walk.runs(begin, end, 2 * count + 2, [&](const int64_t* offsets, int64_t rows) {
      for (int64_t s = 0; s < count; ++s) {
        at[s] = parts[s] + offsets[s];
        lse_at[s] = part_lses[s] + offsets[count + s];
      }
      Run run{rows, count, dim, at.data(), lse_at.data(), part_steps.data(), lse_steps.data(),
              out_data + offsets[2 * count], lse_data + offsets[2 * count + 1],
              walk.step(2 * count), walk.step(2 * count + 1), weights.data()};
      EA_DISPATCH(merge_rows<Value, Lse>)(run);
    });
  });
}

}  // namespace

std::tuple<Tensor, Tensor> merge_states(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  check(outs, lses);
  const ScalarType dtype = outs[0].scalar_type();
  const bool widens = lses[0].scalar_type() == ScalarType::Double && dtype != ScalarType::Double;
  for (Tensor& part : outs) {
    // fp64 weights would be wasted on fp32 sums.
    if (widens) part = torch::stable::to(part, ScalarType::Double);
    if (part.size(-1) > 1 && part.stride(-1) != 1) part = torch::stable::contiguous(part);
  }
  Tensor out = torch::stable::new_empty(outs[0], outs[0].sizes());
  Tensor lse = torch::stable::new_empty(lses[0], lses[0].sizes());
  const bool double_lse = lse.scalar_type() == ScalarType::Double;
  switch (out.scalar_type()) {
    case ScalarType::Float: merge<float, float>(outs, lses, out, lse); break;
    case ScalarType::BFloat16: merge<BFloat16, float>(outs, lses, out, lse); break;
    case ScalarType::Half: merge<Half, float>(outs, lses, out, lse); break;
    default:
      double_lse ? merge<double, double>(outs, lses, out, lse)
                 : merge<double, float>(outs, lses, out, lse);
  }
  return {widens ? torch::stable::to(out, dtype) : out, lse};
}

}  // namespace ea::cpu
