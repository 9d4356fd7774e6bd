#pragma once

#include <cstdint>
#include <type_traits>

namespace ea::cpu {

// A run of rows that lie at constant steps in every tensor. Pointers stand at the current row and are
// moved along by the kernel.
template <typename Value_, typename Lse_, typename Out_ = Value_>
struct MergeRun {
  using Value = Value_;
  using Lse = Lse_;
  using Out = Out_;
  using Real = std::conditional_t<std::is_same_v<Value, double>, double, float>;

  int64_t rows, count, dim;
  const Value** parts;  // (count) rows of dim values
  const Lse** lses;     // (count) single numbers
  const int64_t* part_steps;
  const int64_t* lse_steps;
  Out* out;
  Lse* lse;
  int64_t out_step, lse_step;
  Real* weights;  // (count), scratch
};

}  // namespace ea::cpu
