#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

// A HyperPlan as plain memory, and the tiles that it is walked in.

namespace ea::cpu {

// The fields of efficient_attn.planning.HyperPlan, whose docstring says what they mean.
struct HyperPlan {
  int64_t batch, key_heads, group, nq, nk, levels, num_tiles, tile_rows, sample_sets, draws;
  const int32_t *key_order, *key_rank, *band_start, *band_end;
  const int32_t *block_rows, *block_first, *block_sample;
  const int32_t* sample_keys;
  const float* sample_log_weight;
  bool causal;
  int64_t leaf_size, window, sinks, block_size;
  bool samples_by_leaf;

  int64_t heads() const { return batch * key_heads; }
  int64_t rows() const { return group * nq; }
  int64_t corner() const { return nk - nq; }

  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

  int64_t first_leaf() const { return causal ? 0 : std::min<int64_t>(floor_div(corner(), leaf_size), 0); }

  // The exact keys [first, second) of a query at a position, sinks apart.
  std::pair<int64_t, int64_t> near(int64_t position) const {
    if (leaf_size == 0) return {0, 0};
    const int64_t start = floor_div(position, leaf_size) * leaf_size;
    const int64_t end = causal ? position + 1 : start + leaf_size + window;
    return {std::max<int64_t>(start - window, 0), std::clamp<int64_t>(end, 0, nk)};
  }
};

// Queries that are computed together: of a leaf, those at some positions, in every head of a group; or
// some rows of a tile of blocks.
struct HyperTask {
  int64_t head;         // among all key heads of all samples
  int64_t tile;         // of blocks, or -1 for a leaf
  int64_t first, last;  // positions, or places in the tile
};

// The leaves. The longest come first, since the last ones decide when the threads are done.
inline std::vector<HyperTask> leaf_tasks(const HyperPlan& plan, int64_t most_rows) {
  std::vector<HyperTask> tasks;
  if (plan.leaf_size == 0) return tasks;
  const int64_t together = std::max<int64_t>(1, most_rows / plan.group);
  const int64_t begin = plan.causal ? std::max<int64_t>(plan.corner(), 0) : plan.corner();
  for (int64_t head = 0; head < plan.heads(); ++head) {
    for (int64_t first = begin; first < plan.nk;) {
      const int64_t leaf_end = (HyperPlan::floor_div(first, plan.leaf_size) + 1) * plan.leaf_size;
      const int64_t last = std::min({first + together, leaf_end, plan.nk});
      tasks.push_back({head, -1, first, last});
      first = last;
    }
  }
  if (plan.causal) {
    const auto keys = [&](const HyperTask& task) {
      return task.last - plan.near(task.first).first;
    };
    std::stable_sort(tasks.begin(), tasks.end(), [&](const HyperTask& a, const HyperTask& b) {
      return keys(a) > keys(b);
    });
  }
  return tasks;
}

// The tiles of blocks of one level. No query is in two of them.
inline std::vector<HyperTask> block_tasks(const HyperPlan& plan, int64_t level, int64_t most_rows) {
  std::vector<HyperTask> tasks;
  for (int64_t head = 0; head < plan.heads(); ++head) {
    for (int64_t tile = 0; tile < plan.num_tiles; ++tile) {
      const int64_t at = head * plan.num_tiles + tile;
      if (plan.block_first[at] / plan.nk != level) continue;
      const int32_t* rows = plan.block_rows + at * plan.tile_rows;
      int64_t count = plan.tile_rows;
      while (count > 0 && rows[count - 1] < 0) --count;
      for (int64_t first = 0; first < count; first += most_rows) {
        tasks.push_back({head, tile, first, std::min(first + most_rows, count)});
      }
    }
  }
  return tasks;
}

// Tasks that may run at the same time, since a query is in one of them: the leaves, then each level.
inline std::vector<std::vector<HyperTask>> phases(const HyperPlan& plan, int64_t most_rows) {
  std::vector<std::vector<HyperTask>> phases{leaf_tasks(plan, most_rows)};
  for (int64_t level = 0; level < plan.levels; ++level) {
    phases.push_back(block_tasks(plan, level, most_rows));
  }
  phases.erase(std::remove_if(phases.begin(), phases.end(),
                              [](const std::vector<HyperTask>& tasks) { return tasks.empty(); }),
               phases.end());
  return phases;
}

// No fewer than the keys of a task.
inline int64_t most_columns(const HyperPlan& plan, const HyperTask& task) {
  if (task.tile >= 0) return plan.block_size + (plan.samples_by_leaf ? 0 : plan.draws);
  const int64_t end = plan.causal ? task.last : plan.near(task.first).second;
  const int64_t near = std::max<int64_t>(0, end - plan.near(task.first).first);
  return near + (plan.samples_by_leaf ? plan.sinks + plan.draws : 0);
}

}  // namespace ea::cpu
