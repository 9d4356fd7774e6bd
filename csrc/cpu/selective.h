#pragma once

#include "common/online_softmax.h"
#include "common/selection.h"
#include "cpu/decode.h"

// What the kernels of attention with selected values are told, beside what they share with attention
// to a cache. Plain data: they are compiled for several instruction sets.

namespace ea::cpu {

// The queries of one key head against the cached tokens [begin, end): which may be selected, and the
// softmax of all. Of the part itself, what has to do with keys is used.
template <typename Value>
struct ScorePart : DecodePart<Value> {
  using Real = RealOf<Value>;

  int64_t most;  // candidates that can be selected; 0 if their weight decides
  Real margin;   // then those so far below the largest score cannot be
  Real* floors;  // (rows) scores up to which nothing is selected; raised on the way

  Candidate<Real>* candidates;  // (rows, room), `most` and a block at least, or all
  int64_t* counts;              // (rows)
  int64_t room;
};

// One query and what it has selected. Of the part itself, what has to do with values is used, for a
// single row.
template <typename Value>
struct SelectedRow : DecodePart<Value> {
  using Real = RealOf<Value>;

  const Candidate<Real>* selected;  // (count), in the order of their tokens
  int64_t count, value_head;
  SoftmaxState<Real> state;  // of all visible keys
  Value* out;                // (value.dim), relative to the weight of what is selected
  Real* kept;                // and that weight
};

}  // namespace ea::cpu
