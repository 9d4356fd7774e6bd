#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/selective.h"

// How the scores of a call are cut into parts, from sizes alone.

namespace ea::cpu {

// Some queries of the heads that read one key head, and the cached tokens [begin, end) that they see,
// in splits of `split_tokens`.
struct ScoreGroup {
  int64_t sequence, key_head;
  std::vector<int32_t> heads;
  int64_t first_token, tokens, newest;
  int64_t begin, end, splits, split_tokens;
  int64_t first_part, first_row;  // of its splits in all parts, of its rows in all rows
  int64_t first_state;            // of its rows(), split by split
  int64_t first_score, first_top;  // of its rows, in the memory of its wave
  int64_t top_blocks;             // the largest scores are kept of so many blocks together

  int64_t rows() const { return int64_t(heads.size()) * tokens; }
  // Of a row: whole blocks of scores, and the largest of them.
  int64_t scores() const { return splits * split_tokens; }
  int64_t split_tops() const {
    const int64_t blocks = split_tokens / kDecodeBlock;
    return (blocks + top_blocks - 1) / top_blocks * kTops;
  }
  int64_t tops() const { return splits * split_tops(); }
};

// Groups whose scores are held at a time, [first, end) of them, of their parts and of their rows.
struct ScoreWave {
  int64_t first_part, end_part, first_row, end_row;
};

struct ScorePlan {
  std::vector<ScoreGroup> groups;
  std::vector<std::pair<int32_t, int32_t>> parts;  // (group, split)
  std::vector<std::pair<int32_t, int32_t>> rows;   // (group, row of it)
  std::vector<ScoreWave> waves;
  int64_t tokens_to_read = 0, most_rows = 0, partial_rows = 0;
  int64_t most_scores = 0, most_tops = 0;  // of a wave
  int64_t longest = 0;  // of a row, in scores

  static constexpr int64_t kMostRows = 256;
  // Scores that are held at a time, unless one row has more.
  static constexpr int64_t kMostScores = 16 << 20;
  // So many times the number of what is selected are kept of the largest scores.
  static constexpr int64_t kTopsOfSelected = 4;
  static constexpr int64_t kLeastPartBytes = 128 << 10;
  static constexpr int64_t kMostParts = 128;

  void add_sequence(
      const std::vector<int32_t>& q_to_k, int64_t num_key_heads, int64_t sequence, int64_t length,
      int64_t num_tokens, int64_t window_left) {
    for (int64_t head = 0; head < num_key_heads; ++head) {
      ScoreGroup group{};
      for (size_t h = 0; h < q_to_k.size(); ++h) {
        if (q_to_k[h] == head) group.heads.push_back(int32_t(h));
      }
      if (group.heads.empty()) continue;
      group.sequence = sequence;
      group.key_head = head;
      const int64_t allowed = std::min(kMostRows, kMostScores / std::max<int64_t>(1, length));
      const int64_t most = std::max<int64_t>(1, allowed / int64_t(group.heads.size()));
      for (int64_t first = 0; first < num_tokens; first += most) {
        group.first_token = first;
        group.tokens = std::min(most, num_tokens - first);
        group.newest = length - num_tokens + first;
        group.end = std::max<int64_t>(0, group.newest + group.tokens);
        const int64_t oldest = window_left < 0 ? 0 : group.newest - window_left;
        group.begin = std::min(group.end, std::max<int64_t>(0, oldest));
        tokens_to_read += group.end - group.begin;
        groups.push_back(group);
      }
    }
  }

  // `selected` is how many values a row selects, 0 if that is not known.
  void split(int64_t token_bytes, int64_t selected) {
    const int64_t least = std::max<int64_t>(kLeastPartBytes / token_bytes, 1);
    const int64_t most = std::max(tokens_to_read / kMostParts, least);
    const auto whole = [](int64_t count, int64_t size) { return (count + size - 1) / size; };
    int64_t scores = 0, tops = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      ScoreGroup& group = groups[g];
      // Splits of about the same size, rather than full ones and a rest.
      const int64_t count = std::max<int64_t>(1, whole(group.end - group.begin, most));
      const int64_t blocks = whole(whole(group.end - group.begin, count), kDecodeBlock);
      group.split_tokens = std::max<int64_t>(1, blocks) * kDecodeBlock;
      group.splits = std::max<int64_t>(1, whole(group.end - group.begin, group.split_tokens));
      const int64_t wanted = std::max<int64_t>(1, selected * kTopsOfSelected / kTops);
      group.top_blocks =
          selected ? std::max<int64_t>(1, group.scores() / kDecodeBlock / wanted) : blocks + 1;
      group.first_part = parts.size();
      group.first_row = rows.size();
      const int64_t size = group.rows() * group.scores();
      if (waves.empty() || scores + size > kMostScores) {
        scores = tops = 0;
        waves.push_back({group.first_part, 0, group.first_row, 0});
      }
      group.first_score = scores;
      group.first_top = tops;
      scores += size;
      tops += group.rows() * group.tops();
      most_scores = std::max(most_scores, scores);
      most_tops = std::max(most_tops, tops);
      most_rows = std::max(most_rows, group.rows());
      longest = std::max(longest, group.scores());
      group.first_state = partial_rows;
      partial_rows += group.splits * group.rows();
      for (int64_t s = 0; s < group.splits; ++s) parts.emplace_back(g, s);
      for (int64_t r = 0; r < group.rows(); ++r) rows.emplace_back(g, r);
      waves.back().end_part = parts.size();
      waves.back().end_row = rows.size();
    }
  }
};

}  // namespace ea::cpu
