#include "cpu/decode_tensors.h"
#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/selective_run.h"

namespace ea::cpu {
namespace {

template <typename Value>
std::tuple<Tensor, Tensor, Tensor> attend(
    const Tensor& given, const Cached& cached, const Options& options,
    std::optional<int64_t> top_values, double dropped_mass) {
  using Real = RealOf<Value>;
  const Tensor query = given.stride(3) == 1 ? given : torch::stable::contiguous(given);
  SelectiveCall<Value> call{call_of<Value>(query, cached, options)};
  call.num_key_heads = cached.key.size(1);
  for (int64_t b = 0; b < (options.one_map() ? 1 : call.batch); ++b) {
    call.q_to_k.push_back(
        head_index(options.q_to_k, b, call.heads, cached.key.size(1), "q_to_k"));
    call.q_to_v.push_back(
        head_index(options.q_to_v, b, call.heads, cached.value.size(1), "q_to_v"));
  }
  call.top_values = top_values.value_or(0);
  call.dropped_mass = dropped_mass;
  Tensor out =
      torch::stable::new_empty(query, {call.batch, call.tokens, call.heads, call.value.dim});
  const std::vector<int64_t> rows{call.batch, call.heads, call.tokens};
  const ScalarType real = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
  Tensor lse = torch::stable::new_empty(query, rows, real);
  Tensor kept = torch::stable::new_empty(query, rows, real);
  call.out = static_cast<Value*>(out.mutable_data_ptr());
  call.lse = static_cast<Real*>(lse.mutable_data_ptr());
  call.kept = static_cast<Real*>(kept.mutable_data_ptr());
  run_selective(call);
  return {torch::stable::transpose(out, 1, 2), lse, kept};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> selective_decode(
    Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths,
    std::optional<Tensor> block_table, std::optional<Tensor> q_to_k, std::optional<Tensor> q_to_v,
    std::optional<int64_t> window_left, double scale, double softcap,
    std::optional<int64_t> top_values, double dropped_mass) {
  check_fit("selective_decode", query, key_cache, value_cache);
  STD_TORCH_CHECK(top_values ? *top_values > 0 : dropped_mass >= 0 && dropped_mass < 1,
                  "selective_decode got top_values ", top_values.value_or(0), " and dropped_mass ",
                  dropped_mass, "; pass a positive number, or none and a mass in [0, 1).");
  const Cached cached{key_cache, value_cache, cache_lengths, block_table};
  const Options options{q_to_k, q_to_v, window_left, scale, softcap};
  switch (query.scalar_type()) {
    case ScalarType::Float:
      return attend<float>(query, cached, options, top_values, dropped_mass);
    case ScalarType::BFloat16:
      return attend<BFloat16>(query, cached, options, top_values, dropped_mass);
    case ScalarType::Half:
      return attend<Half>(query, cached, options, top_values, dropped_mass);
    case ScalarType::Double:
      return attend<double>(query, cached, options, top_values, dropped_mass);
    default: break;
  }
  STD_TORCH_CHECK(false, "selective_decode got ", torch::headeronly::toString(query.scalar_type()),
                  "; pass float16, bfloat16, float32 or float64.");
}

}  // namespace ea::cpu
