#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/isa.h"

// What the kernel of attention to gathered tokens is told. Plain data: it is compiled for several
// instruction sets.

namespace ea::cpu {

// So many keys, and so many queries, are multiplied at a time.
constexpr int64_t kTileBlock = 64;

constexpr int64_t whole_blocks(int64_t size) {
  return (size + kTileBlock - 1) / kTileBlock * kTileBlock;
}

// Scratch of a thread. Rows of tokens are padded to whole vectors, queries to whole blocks.
constexpr int64_t padded_width(int64_t dim) { return (dim + 15) / 16 * 16; }

// Integers as wide as the numbers that they are compared for.
template <typename Real>
using IntegerOf = std::conditional_t<std::is_same_v<Real, double>, int64_t, int32_t>;

// Some queries, `rows` of them, and the keys that they share, `columns` of one head, which lie anywhere
// in it. Steps in elements.
template <typename Value>
struct Tile {
  using Real = RealOf<Value>;
  using Integer = IntegerOf<Real>;

  int64_t rows, columns, dim, value_dim;
  Real scale;
  const Value* const* queries;  // (rows)
  const Value *key, *value;     // the head
  int64_t key_step, value_step;
  const int32_t* tokens;     // (columns), in the head
  const Real* log_weights;   // (columns), added to scores; or nothing

  // A row sees the columns whose `place` is below its `limit`, and whose `rank` is not in its range
  // that is `hidden`. Either may be nothing. By row there are whole blocks.
  const Integer *place, *limit;
  const Integer *rank, *hidden_from, *hidden_to;

  // Scratch.
  Real* queries_by_dim;  // (blocks of rows, dim, kTileBlock)
  Real *keys, *values;   // (kTileBlock, padded width)
  Real* scores;          // (kTileBlock, kTileBlock), by key
};

// Their attention.
template <typename Value>
struct AttendTile : Tile<Value> {
  using Real = RealOf<Value>;

  Real* const* outs;  // (rows) of value_dim values
  Real* const* lses;  // (rows)
  bool merges;        // with what is there already; an lse of -inf says that nothing is

  // Scratch.
  Real* weighted;          // (rows, padded width of values)
  Real *max, *sum, *fade;  // (rows)
};

// The gradient of their attention, which is a part of what the rows attend to.
template <typename Value>
struct DifferentiateTile : Tile<Value> {
  using Real = RealOf<Value>;

  const Value* const* grad_outs;  // (rows) of value_dim values
  const Real *lses, *deltas;      // (blocks of rows), of everything that the rows attend to
  Real* const* grad_queries;      // (rows), to be added to
  Real *grad_keys, *grad_values;  // (columns, padded width), to be written

  // Scratch.
  Real* grad_outs_by_dim;  // (blocks of rows, value_dim, kTileBlock)
  Real* query_rows;        // (rows, padded width), scaled
  Real* grad_out_rows;     // (rows, padded width)
  Real* grad_scores;       // as scores
  Real* grad_query_rows;   // (rows, padded width)
};

}  // namespace ea::cpu
