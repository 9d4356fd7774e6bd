#pragma once

#include <cstdint>
#include <vector>

#include "cpu/decode.h"
#include "cpu/head_families.h"

namespace ea::cpu {

// A call in plain pointers. Steps in elements.
template <typename Value>
struct DecodeCall {
  using Real = RealOf<Value>;

  int64_t batch, heads, tokens;
  const Value* query;
  int64_t query_batch_step, query_head_step, query_token_step;
  CachedRows<Value> key, value;  // of any sequence: its pages are filled in later
  bool value_in_key;             // values are the first columns of keys
  Integers table;                // of the first sequence; no data where there is none
  int64_t table_step;
  std::vector<int64_t> lengths;
  std::vector<std::vector<HeadFamily>> families;  // one map for all sequences, or one for each
  int64_t window_left;                            // negative for none
  Real scale, softcap;
  Value* out;  // (batch, tokens, heads, value.dim)
  Real* lse;   // (batch, heads, tokens)

  Integers pages(int64_t sequence) const {
    Integers pages = table;
    const int64_t bytes = sequence * table_step * (table.wide ? 8 : 4);
    if (table.data) pages.data = static_cast<const char*>(table.data) + bytes;
    return pages;
  }
};

template <typename Value>
void run_decode(const DecodeCall<Value>& call);

}  // namespace ea::cpu
