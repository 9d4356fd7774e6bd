#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/hyper_run.h"
#include "cpu/ops.h"

#define EA_BODY "cpu/row_product.inl"
#include "cpu/for_each_isa.h"

// Tensors to plain pointers, and checks of what would make the kernel read elsewhere.

namespace ea::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The fields of a plan as the schema passes them.
struct PlanTensors {
  Tensor key_order, key_rank, band_start, band_end, block_rows, block_first, block_sample;
  Tensor sample_keys, sample_log_weight;

  explicit PlanTensors(const std::vector<Tensor>& given)
      : key_order(given[0]), key_rank(given[1]), band_start(given[2]), band_end(given[3]),
        block_rows(given[4]), block_first(given[5]), block_sample(given[6]),
        sample_keys(given[7]), sample_log_weight(given[8]) {
    for (Tensor* x : {&key_order, &key_rank, &band_start, &band_end, &block_rows, &block_first,
                      &block_sample, &sample_keys}) {
      STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == ScalarType::Int, "a tensor of the plan has dtype ",
                      torch::headeronly::toString(x->scalar_type()), "; pass int32 on the CPU.");
      *x = torch::stable::contiguous(*x);
    }
    STD_TORCH_CHECK(sample_log_weight.scalar_type() == ScalarType::Float,
                    "sample_log_weight of the plan is not float32.");
    sample_log_weight = torch::stable::contiguous(sample_log_weight);
  }
};

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == int64_t(shape.size());
  for (size_t d = 0; fits && d < shape.size(); ++d) fits = tensor.size(d) == shape.begin()[d];
  STD_TORCH_CHECK(fits, name, " of the plan does not have the shape that the others ask for.");
}

const int32_t* integers(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

HyperPlan plan_of(
    const PlanTensors& tensors, const Tensor& query, const Tensor& key, bool causal,
    int64_t leaf_size, int64_t window, int64_t sinks, int64_t block_size, bool samples_by_leaf) {
  const auto& [key_order, key_rank, band_start, band_end, block_rows, block_first, block_sample,
               sample_keys, sample_log_weight] = tensors;
  const int64_t batch = key.size(0), heads = key.size(1), nk = key.size(2), nq = query.size(2);
  STD_TORCH_CHECK(heads > 0 && nk > 0 && query.size(0) == batch && query.size(1) % heads == 0,
                  "hyper_attention got a query and a key that do not fit together.");
  const int64_t group = query.size(1) / heads, rows = group * nq;
  STD_TORCH_CHECK(key_order.dim() == 4 && block_rows.dim() == 4 && sample_keys.dim() == 3,
                  "a tensor of the plan has the wrong number of dimensions.");
  const int64_t levels = key_order.size(2), tiles = block_rows.size(2);
  const int64_t sets = sample_keys.size(1), draws = sample_keys.size(2);
  check_shape("key_order", key_order, {batch, heads, levels, nk});
  check_shape("key_rank", key_rank, {batch, heads, levels, nk});
  check_shape("band_start", band_start, {batch, heads, levels, rows});
  check_shape("band_end", band_end, {batch, heads, levels, rows});
  check_shape("block_rows", block_rows, {batch, heads, tiles, block_rows.size(3)});
  check_shape("block_first", block_first, {batch, heads, tiles});
  check_shape("block_sample", block_sample, {samples_by_leaf ? 0 : tiles});
  check_shape("sample_keys", sample_keys, {heads, sets, draws});
  check_shape("sample_log_weight", sample_log_weight, {sets, draws});
  return {batch, heads, group, nq, nk, levels, tiles, block_rows.size(3), sets, draws,
          integers(key_order), integers(key_rank), integers(band_start), integers(band_end),
          integers(block_rows), integers(block_first), integers(block_sample),
          integers(sample_keys), static_cast<const float*>(sample_log_weight.const_data_ptr()),
          causal, leaf_size, window, sinks, block_size, samples_by_leaf};
}

Tensor rows_adjacent(const Tensor& x) {
  return x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

template <typename Value>
Tokens<const Value> tokens(const Tensor& x) {
  return {static_cast<const Value*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename Value>
HyperCall<Value> call_of(
    const HyperPlan& plan, const Tensor& query, const Tensor& key, const Tensor& value,
    double scale) {
  return {plan, query.size(3), value.size(3), RealOf<Value>(scale), tokens<Value>(query),
          tokens<Value>(key), tokens<Value>(value)};
}

template <typename Value>
constexpr ScalarType real_type() {
  return std::is_same_v<Value, double> ? ScalarType::Double : ScalarType::Float;
}

// Numbers to compute with, one row of them for each token, tokens before heads.
template <typename Value>
std::pair<Tensor, Tokens<RealOf<Value>>> tokens_major(
    const Tensor& like, int64_t batch, int64_t tokens, int64_t heads, int64_t dim) {
  Tensor x = torch::stable::new_empty(like, {batch, tokens, heads, dim}, real_type<Value>());
  auto* data = static_cast<RealOf<Value>*>(x.mutable_data_ptr());
  return {x, {data, tokens * heads * dim, dim, heads * dim}};
}

// The same in the dtype of `like`, heads before tokens.
Tensor finished(const Tensor& x, const Tensor& like) {
  const bool same = x.scalar_type() == like.scalar_type();
  return torch::stable::transpose(same ? x : torch::stable::to(x, like.scalar_type()), 1, 2);
}

constexpr const char* kUnsound = "the plan names a query or a key that does not exist.";

template <typename Value>
std::tuple<Tensor, Tensor> attend(
    const Tensor& query, const Tensor& key, const Tensor& value, const HyperPlan& plan,
    double scale) {
  using Real = RealOf<Value>;
  const int64_t batch = plan.batch, heads = query.size(1), nq = plan.nq, dim = value.size(3);
  auto [out, out_at] = tokens_major<Value>(query, batch, nq, heads, dim);
  Tensor lse = torch::stable::new_empty(query, {batch, heads, nq}, real_type<Value>());
  auto* lse_at = static_cast<Real*>(lse.mutable_data_ptr());
  std::fill_n(lse_at, lse.numel(), Real(-INFINITY));
  const HyperForward<Value> pass{
      call_of<Value>(plan, query, key, value, scale), out_at, {lse_at, heads * nq, nq, 1}};
  STD_TORCH_CHECK(run_hyper(pass), kUnsound);
  // What sees nothing was in no task, or in some that left it alone.
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < nq; ++i) {
        if (*pass.lse.at(b, h, i) == Real(-INFINITY)) std::fill_n(pass.out.at(b, h, i), dim, Real(0));
      }
    }
  }
  return {finished(out, query), lse};
}

// rowsum(grad_out * out) - grad_lse, (batch, heads, tokens).
template <typename Value>
Tensor deltas(const Tensor& grad_out, const Tensor& out, const std::optional<Tensor>& grad_lse,
              const Tensor& lse) {
  using Real = RealOf<Value>;
  Tensor delta = torch::stable::empty_like(lse);
  auto* to = static_cast<Real*>(delta.mutable_data_ptr());
  const auto* minus = grad_lse ? static_cast<const Real*>(grad_lse->const_data_ptr()) : nullptr;
  const Tokens<const Value> grad_at = tokens<Value>(grad_out), out_at = tokens<Value>(out);
  const int64_t heads = out.size(1), nq = out.size(2), dim = out.size(3);
  torch::stable::parallel_for(0, lse.numel(), 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (heads * nq), h = i / nq % heads, token = i % nq;
      to[i] = EA_DISPATCH(row_product<Value>)(grad_at.at(b, h, token), out_at.at(b, h, token), dim);
      if (minus) to[i] -= minus[i];
    }
  });
  return delta;
}

template <typename Value>
std::tuple<Tensor, Tensor, Tensor> differentiate(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
    const HyperPlan& plan, double scale) {
  using Real = RealOf<Value>;
  const int64_t batch = plan.batch, heads = query.size(1), nq = plan.nq, nk = plan.nk;
  const Tensor delta = deltas<Value>(grad_out, out, grad_lse, lse);
  auto [grad_query, grad_query_at] = tokens_major<Value>(query, batch, nq, heads, query.size(3));
  auto [grad_key, grad_key_at] = tokens_major<Value>(query, batch, nk, plan.key_heads, key.size(3));
  auto [grad_value, grad_value_at] =
      tokens_major<Value>(query, batch, nk, plan.key_heads, value.size(3));
  for (Tensor* x : {&grad_query, &grad_key, &grad_value}) torch::stable::zero_(*x);
  const auto by_row = [&](const Tensor& x) {
    return Tokens<const Real>{static_cast<const Real*>(x.const_data_ptr()), heads * nq, nq, 1};
  };
  const HyperBackward<Value> pass{call_of<Value>(plan, query, key, value, scale),
                                  tokens<Value>(grad_out), by_row(lse), by_row(delta),
                                  grad_query_at, grad_key_at, grad_value_at};
  STD_TORCH_CHECK(run_hyper(pass), kUnsound);
  return {finished(grad_query, query), finished(grad_key, query), finished(grad_value, query)};
}

void check_inputs(const Tensor& query, const Tensor& key, const Tensor& value) {
  for (const Tensor* x : {&query, &key, &value}) {
    STD_TORCH_CHECK(x->is_cpu() && x->dim() == 4 && x->scalar_type() == query.scalar_type(),
                    "hyper_attention got tensors of different dtypes, devices or ranks; pass them ",
                    "all in one dtype on the CPU, (batch, heads, tokens, dim).");
  }
  STD_TORCH_CHECK(query.size(3) == key.size(3) && value.size(0) == key.size(0) &&
                      value.size(1) == key.size(1) && value.size(2) == key.size(2),
                  "hyper_attention got a query, key and value that do not fit together.");
}

template <typename Call>
auto in_dtype_of(const Tensor& x, const Call& call) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return call(float{});
    case ScalarType::BFloat16: return call(BFloat16{});
    case ScalarType::Half: return call(Half{});
    case ScalarType::Double: return call(double{});
    default: break;
  }
  STD_TORCH_CHECK(false, "hyper_attention got ", torch::headeronly::toString(x.scalar_type()),
                  "; pass float16, bfloat16, float32 or float64.");
}

}  // namespace

std::tuple<Tensor, Tensor> hyper_attention(
    Tensor query, Tensor key, Tensor value, Tensor key_order, Tensor key_rank, Tensor band_start,
    Tensor band_end, Tensor block_rows, Tensor block_first, Tensor block_sample,
    Tensor sample_keys, Tensor sample_log_weight, bool causal, int64_t leaf_size, int64_t window,
    int64_t sinks, int64_t block_size, bool samples_by_leaf, double scale) {
  check_inputs(query, key, value);
  const PlanTensors tensors({key_order, key_rank, band_start, band_end, block_rows, block_first,
                             block_sample, sample_keys, sample_log_weight});
  const HyperPlan plan = plan_of(tensors, query, key, causal, leaf_size, window, sinks, block_size,
                                 samples_by_leaf);
  query = rows_adjacent(query);
  key = rows_adjacent(key);
  value = rows_adjacent(value);
  return in_dtype_of(query, [&](auto zero) {
    return attend<decltype(zero)>(query, key, value, plan, scale);
  });
}

std::tuple<Tensor, Tensor, Tensor> hyper_attention_backward(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query, Tensor key, Tensor value,
    Tensor out, Tensor lse, Tensor key_order, Tensor key_rank, Tensor band_start, Tensor band_end,
    Tensor block_rows, Tensor block_first, Tensor block_sample, Tensor sample_keys,
    Tensor sample_log_weight, bool causal, int64_t leaf_size, int64_t window, int64_t sinks,
    int64_t block_size, bool samples_by_leaf, double scale) {
  check_inputs(query, key, value);
  check_inputs(out, value, value);
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(grad_out.dim() == 4 && grad_out.size(d) == out.size(d) &&
                        (d == 3 || (lse.dim() == 3 && lse.size(d) == out.size(d) &&
                                    out.size(d) == query.size(d))),
                    "hyper_attention_backward got results that do not fit the query.");
  }
  const PlanTensors tensors({key_order, key_rank, band_start, band_end, block_rows, block_first,
                             block_sample, sample_keys, sample_log_weight});
  const HyperPlan plan = plan_of(tensors, query, key, causal, leaf_size, window, sinks, block_size,
                                 samples_by_leaf);
  if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);
  lse = torch::stable::contiguous(lse);
  for (Tensor* x : {&query, &key, &value, &out, &grad_out}) *x = rows_adjacent(*x);
  return in_dtype_of(query, [&](auto zero) {
    return differentiate<decltype(zero)>(grad_out, grad_lse, query, key, value, out, lse, plan,
                                         scale);
  });
}

}  // namespace ea::cpu
