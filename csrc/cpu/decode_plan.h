#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/decode.h"
#include "cpu/head_families.h"

// How a call is cut into parts of about equal size, from sizes alone: the same on any number of
// threads, and so are the bits of the result.

namespace ea::cpu {

struct DecodeSizes {
  int64_t dim, value_dim;
  int64_t value_bytes, real_bytes;  // of one number in the cache and in the arithmetic
  bool value_in_key;                // values are part of the rows of keys

  int64_t token_bytes(const HeadFamily& family) const {
    const int64_t values = value_in_key ? 0 : int64_t(family.values.size()) * value_dim;
    return (int64_t(family.keys.size()) * dim + values) * value_bytes;
  }
  int64_t row_bytes() const { return (dim + value_dim + 2 * kDecodeBlock) * real_bytes; }
};

// Some queries of one sequence and family, and the cached tokens [begin, end) that they see, in
// splits of `split_tokens`.
struct DecodeGroup {
  const HeadFamily* family;
  int64_t sequence, first_token, tokens, newest;
  int64_t begin, end, splits, split_tokens;
  int64_t first_partial;  // of its splits * rows() partial results, where there is more than one split

  int64_t rows() const { return int64_t(family->heads.size()) * tokens; }
};

struct DecodePlan {
  std::vector<DecodeGroup> groups;
  std::vector<std::pair<int32_t, int32_t>> parts;  // (group, split)
  int64_t bytes = 0, partials = 0, most_rows = 0;

  // Queries that are many enough to fill the second-level cache are taken in turns.
  static constexpr int64_t kMostRowBytes = 512 << 10;
  static constexpr int64_t kLeastPartBytes = 128 << 10;
  static constexpr int64_t kMostParts = 256;
  static constexpr int64_t kBytesPerPartialByte = 16;

  void add_sequence(
      const DecodeSizes& sizes, const std::vector<HeadFamily>& families, int64_t sequence,
      int64_t length, int64_t num_tokens, int64_t window_left) {
    for (const HeadFamily& family : families) {
      const int64_t heads = family.heads.size();
      const int64_t most = std::max<int64_t>(1, kMostRowBytes / sizes.row_bytes() / heads);
      for (int64_t first = 0; first < num_tokens; first += most) {
        DecodeGroup group{};
        group.family = &family;
        group.sequence = sequence;
        group.first_token = first;
        group.tokens = std::min(most, num_tokens - first);
        group.newest = length - num_tokens + first;
        group.end = std::max<int64_t>(0, group.newest + group.tokens);
        const int64_t oldest = window_left < 0 ? 0 : group.newest - window_left;
        group.begin = std::min(group.end, std::max<int64_t>(0, oldest));
        bytes += (group.end - group.begin) * sizes.token_bytes(family);
        groups.push_back(group);
      }
    }
  }

  // How many of `size` hold `count`.
  static int64_t whole(int64_t count, int64_t size) { return (count + size - 1) / size; }

  void split(const DecodeSizes& sizes) {
    for (size_t g = 0; g < groups.size(); ++g) {
      DecodeGroup& group = groups[g];
      const int64_t partial_bytes = group.rows() * (sizes.value_dim + 1) * sizes.real_bytes;
      const int64_t part_bytes = std::max(
          {bytes / kMostParts, kLeastPartBytes, partial_bytes * kBytesPerPartialByte});
      const int64_t token_bytes = std::max<int64_t>(1, sizes.token_bytes(*group.family));
      const int64_t most = std::max<int64_t>(1, part_bytes / token_bytes / kDecodeBlock);
      // Splits of about the same size, rather than full ones and a rest.
      const int64_t blocks = whole(group.end - group.begin, kDecodeBlock);
      const int64_t each = std::max<int64_t>(
          1, whole(blocks, std::max<int64_t>(1, whole(blocks, most))));
      group.split_tokens = each * kDecodeBlock;
      group.splits = std::max<int64_t>(1, whole(blocks, each));
      group.first_partial = partials;
      if (group.splits > 1) partials += group.splits * group.rows();
      most_rows = std::max(most_rows, group.rows());
      for (int64_t s = 0; s < group.splits; ++s) parts.emplace_back(g, s);
    }
  }
};

}  // namespace ea::cpu
