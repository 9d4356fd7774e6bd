#pragma once

#include "common/online_softmax.h"
#include "common/selection.h"
#include "cpu/decode.h"

// What the kernels of attention with selected values are told, beside what they share with attention
// to a cache. Plain data: they are compiled for several instruction sets.

namespace ea::cpu {

// So many of the largest scores are kept together: the most that a vector has.
constexpr int64_t kTops = 16;

// The queries of one key head against the cached tokens [begin, end): all their scores, the softmax of
// these, and the largest of some. Of the part itself, what has to do with keys is used.
template <typename Value>
struct ScorePart : DecodePart<Value> {
  using Real = RealOf<Value>;

  Real* all_scores;  // (rows, score_step), whole blocks; -inf where nothing is seen
  int64_t score_step;
  // (rows, top_step), of which tops_of_part are those of this part: number i of each 16 is the largest
  // score of the tokens that are i modulo 16, in so many blocks.
  Real* tops;
  int64_t top_step, tops_of_part, top_blocks;
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
