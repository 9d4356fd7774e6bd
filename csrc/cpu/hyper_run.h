#pragma once

#include "cpu/hyper_tile.h"

namespace ea::cpu {

// Queries of so many rows are computed together.
constexpr int64_t kHyperRows = 256;

template <typename Value>
struct HyperForward {
  using Real = RealOf<Value>;
  HyperCall<Value> call;
  Tokens<Real> out, lse;  // lse is -inf to begin with
};

template <typename Value>
struct HyperBackward {
  using Real = RealOf<Value>;
  HyperCall<Value> call;
  Tokens<const Value> grad_out;
  Tokens<const Real> lse, delta;
  Tokens<Real> grad_query, grad_key, grad_value;  // zero to begin with
};

// Attention as a plan says, and its gradient. False if the plan names a query or key that does not
// exist.
template <typename Value>
bool run_hyper(const HyperForward<Value>& pass);
template <typename Value>
bool run_hyper(const HyperBackward<Value>& pass);

}  // namespace ea::cpu
