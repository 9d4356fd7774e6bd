#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/head_map.h"
#include "cpu/decode.h"

namespace ea::cpu {

// Query heads that are served together, since some read the same key head and some the same value
// head. No cached head is read by two families, and a head that nobody reads is in none.
struct HeadFamily {
  std::vector<int32_t> heads;             // query heads, those of one key head side by side
  std::vector<HeadReaders> keys, values;  // keys count positions in `heads`, values
  std::vector<int32_t> value_members;     // entries of this list of positions in `heads`
};

// The families of one head map, in the order of their first key heads.
inline std::vector<HeadFamily> head_families(
    const std::vector<int32_t>& q_to_k, const std::vector<int32_t>& q_to_v, int num_k_heads,
    int num_v_heads) {
  const int num_q_heads = int(q_to_k.size());
  std::vector<int32_t> starts(num_k_heads + 1), members(num_q_heads);
  invert_head_index(q_to_k.data(), num_q_heads, num_k_heads, starts.data(), members.data());

  // Key heads that share a value head belong together; each is labelled by the first of them.
  std::vector<int32_t> label(num_k_heads), reader_of_value(num_v_heads, -1);
  std::iota(label.begin(), label.end(), 0);
  for (const int32_t h : members) {
    int32_t& reader = reader_of_value[q_to_v[h]];
    if (reader < 0) reader = q_to_k[h];
    const int32_t a = label[reader], b = label[q_to_k[h]];
    if (a != b) std::replace(label.begin(), label.end(), std::max(a, b), std::min(a, b));
  }

  std::vector<HeadFamily> families;
  for (int32_t first = 0; first < num_k_heads; ++first) {
    if (label[first] != first) continue;
    HeadFamily family;
    for (int32_t k = first; k < num_k_heads; ++k) {
      const int32_t count = starts[k + 1] - starts[k];
      if (label[k] != first || count == 0) continue;
      family.keys.push_back({k, int64_t(family.heads.size()), count});
      for (int32_t m = starts[k]; m < starts[k + 1]; ++m) family.heads.push_back(members[m]);
    }
    if (family.heads.empty()) continue;

    const auto value_of = [&](int32_t position) { return q_to_v[family.heads[position]]; };
    auto& positions = family.value_members;
    positions.resize(family.heads.size());
    std::iota(positions.begin(), positions.end(), 0);
    std::stable_sort(positions.begin(), positions.end(),
                     [&](int32_t a, int32_t b) { return value_of(a) < value_of(b); });
    for (size_t i = 0; i < positions.size(); ++i) {
      if (i == 0 || value_of(positions[i]) != family.values.back().head) {
        family.values.push_back({value_of(positions[i]), int64_t(i), 0});
      }
      ++family.values.back().count;
    }
    families.push_back(std::move(family));
  }
  return families;
}

}  // namespace ea::cpu
