#pragma once

#include "cpu/decode_run.h"

namespace ea::cpu {

// A call of attention to a cache, of which the families are not used, and what it selects.
template <typename Value>
struct SelectiveCall : DecodeCall<Value> {
  using Real = RealOf<Value>;

  std::vector<std::vector<int32_t>> q_to_k, q_to_v;  // one map for all sequences, or one for each
  int64_t num_key_heads;
  int64_t top_values;   // 0 if the mass decides
  double dropped_mass;  // no more than this is left out
  Real* kept;           // (batch, heads, tokens)
};

template <typename Value>
void run_selective(const SelectiveCall<Value>& call);

}  // namespace ea::cpu
