#pragma once

#include <cstdint>

#include "common/integers.h"
#include "cpu/isa.h"

// What the kernel of attention to a cache is told. Plain data: it is compiled for several
// instruction sets.

namespace ea::cpu {

// Cached tokens are taken in blocks of so many, whose scores stay in the first-level cache.
constexpr int64_t kDecodeBlock = 64;

// Rows of scratch are padded to a multiple of this, the widest vector there is.
constexpr int64_t kDecodePadding = 32;

inline int64_t padded(int64_t size) {
  return (size + kDecodePadding - 1) / kDecodePadding * kDecodePadding;
}

// Keys or values of one sequence: token t is row t % page_size of page pages.at(t / page_size), or of
// page `only_page` where there is no table. Steps in elements.
template <typename Value>
struct CachedRows {
  const Value* data;
  int64_t page_step, head_step, token_step, dim_step;
  int64_t dim, page_size;
  Integers pages;  // no data where there is no table
  int64_t only_page;
};

// A key or value head and its query heads, which are count entries of a list from `first` on.
struct HeadReaders {
  int64_t head, first, count;
};

// What one thread does at a time: `tokens` queries of some query heads against the cached tokens
// [begin, end). A row is one of these queries; row p * tokens + i is token i of the head at position p.
template <typename Value>
struct DecodePart {
  using Real = RealOf<Value>;

  CachedRows<Value> key, value;
  const HeadReaders *key_heads, *value_heads;
  int64_t num_key_heads, num_value_heads;
  const int32_t* value_rows;  // key heads count rows themselves, value heads entries of this list

  int64_t rows, tokens, begin, end;
  int64_t newest;       // token i sees the cached tokens up to newest + i,
  int64_t window_left;  // and of them only so many before that one; negative for all
  Real scale, softcap;

  const Value* const* queries;  // (rows) of key.dim values
  Value* const* outs;           // (rows) of value.dim values; or, where the sequence is split,
  Real* partial;                // (rows, value.dim)
  Real* const* lses;            // (rows)

  // Scratch. Steps are multiples of kDecodePadding.
  int64_t query_step, weighted_step;
  Real* packed_queries;     // (rows, query_step), possibly in fewer bytes
  Real* columns;            // the same, some channels of several rows side by side
  Real* scores;             // (rows, kDecodeBlock)
  Real* weights;            // the same, as they are multiplied
  Real* weighted;           // (rows, weighted_step)
  Real *max, *sum, *fade;   // (rows)
  Value* gathered;          // (kDecodeBlock, widest dim), for rows that are not contiguous
};

}  // namespace ea::cpu
