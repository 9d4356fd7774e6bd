#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace ea {

// The state of a softmax over the scores seen so far: their maximum, and the sum of
// exp(score - maximum). A state that saw nothing has maximum -inf and sum 0.
template <typename Real>
struct SoftmaxState {
  Real max = Real(-INFINITY);
  Real sum = 0;
};

// exp(x - max), where nothing seen counts as zero rather than as exp(-inf + inf).
template <typename Real>
EA_HOST_DEVICE Real shifted_exp(Real x, Real max) {
  return x == Real(-INFINITY) ? Real(0) : std::exp(x - max);
}

// The state of the scores of both. Commutative, and associative up to rounding.
template <typename Real>
EA_HOST_DEVICE SoftmaxState<Real> merge(SoftmaxState<Real> a, SoftmaxState<Real> b) {
  const Real max = a.max > b.max ? a.max : b.max;
  return {max, a.sum * shifted_exp(a.max, max) + b.sum * shifted_exp(b.max, max)};
}

// log(sum exp(score)) of everything seen; -inf where nothing was.
template <typename Real>
EA_HOST_DEVICE Real log_sum_exp(SoftmaxState<Real> state) {
  return state.sum == 0 ? Real(-INFINITY) : state.max + std::log(state.sum);
}

// How much each of `count` partial results weighs in their merger, from their log-sum-exps.
// weights[s] = exp(lse[s] - lse), all zero where no part saw anything. Returns the merged lse. The
// weights may overwrite the lses.
template <typename Real>
EA_HOST_DEVICE Real merge_weights(const Real* lses, int64_t count, Real* weights) {
  SoftmaxState<Real> state;
  for (int64_t s = 0; s < count; ++s) state.max = lses[s] > state.max ? lses[s] : state.max;
  for (int64_t s = 0; s < count; ++s) {
    weights[s] = shifted_exp(lses[s], state.max);
    state.sum += weights[s];
  }
  const Real scale = state.sum == 0 ? Real(0) : Real(1) / state.sum;
  for (int64_t s = 0; s < count; ++s) weights[s] *= scale;
  return log_sum_exp(state);
}

}  // namespace ea
