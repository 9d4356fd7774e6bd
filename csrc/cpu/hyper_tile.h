#pragma once

#include <climits>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/hyper_plan.h"
#include "cpu/tile.h"

// From a task of a plan to the arguments of the kernel: which rows, which keys, who sees what.

namespace ea::cpu {

// Queries, keys or values: token i of head h of sample b is at b * sample + h * head + i * token.
template <typename Value>
struct Tokens {
  Value* data;
  int64_t sample, head, token;

  Value* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * sample + h * head + i * token;
  }
};

template <typename Value>
struct HyperCall {
  using Real = RealOf<Value>;
  HyperPlan plan;
  int64_t dim, value_dim;
  Real scale;
  Tokens<const Value> query, key, value;
};

// A tile and the memory that it points to. Reused from task to task.
template <typename Value>
class TileOfPlan {
 public:
  using Real = RealOf<Value>;
  using Integer = IntegerOf<Real>;

  explicit TileOfPlan(const HyperCall<Value>& call) : call_(call), plan_(call.plan) {}

  // Fills in rows and columns. False if the plan names a query or key that does not exist.
  bool set(const HyperTask& task, Tile<Value>& tile) {
    sound_ = true;
    rows_.clear();
    tokens_.clear();
    log_weights_.clear();
    place_.clear();
    rank_.clear();
    head_ = task.head;
    sample_ = task.head / plan_.key_heads;
    key_head_ = task.head % plan_.key_heads;
    limits_ = hides_ = false;
    task.tile < 0 ? set_leaf(task) : set_block(task);
    if (!sound_) return false;

    const int64_t rows = rows_.size();
    tile.rows = rows;
    tile.columns = tokens_.size();
    tile.key = call_.key.at(sample_, key_head_, 0);
    tile.value = call_.value.at(sample_, key_head_, 0);
    tile.key_step = call_.key.token;
    tile.value_step = call_.value.token;
    tile.dim = call_.dim;
    tile.value_dim = call_.value_dim;
    tile.scale = call_.scale;
    queries_.resize(rows);
    for (int64_t r = 0; r < rows; ++r) queries_[r] = of_row(call_.query, rows_[r]);
    limit_.resize(whole_blocks(rows), 0);
    hidden_from_.resize(whole_blocks(rows), 0);
    hidden_to_.resize(whole_blocks(rows), 0);
    tile.queries = queries_.data();
    tile.tokens = tokens_.data();
    tile.log_weights = log_weights_.empty() ? nullptr : log_weights_.data();
    tile.place = limits_ ? place_.data() : nullptr;
    tile.limit = limit_.data();
    tile.rank = hides_ ? rank_.data() : nullptr;
    tile.hidden_from = hidden_from_.data();
    tile.hidden_to = hidden_to_.data();
    return true;
  }

  // Where a tensor over queries has the rows of the task.
  template <typename Entry>
  void point(const Tokens<Entry>& tensor, std::vector<Entry*>& rows) const {
    rows.resize(rows_.size());
    for (size_t r = 0; r < rows_.size(); ++r) rows[r] = of_row(tensor, rows_[r]);
  }

  const std::vector<int32_t>& tokens() const { return tokens_; }

 private:
  template <typename Entry>
  Entry* of_row(const Tokens<Entry>& tensor, int32_t row) const {
    return tensor.at(sample_, key_head_ * plan_.group + row / plan_.nq, row % plan_.nq);
  }

  // Entries that everyone sees have the lowest place, and no rank.
  void add_key(int64_t token, Integer place, Integer rank) {
    sound_ &= token >= 0 && token < plan_.nk;
    tokens_.push_back(int32_t(token));
    place_.push_back(place);
    rank_.push_back(rank);
  }

  void add_sample(int64_t set, int64_t draw, Integer rank) {
    const float log_weight = plan_.sample_log_weight[set * plan_.draws + draw];
    if (log_weight == -INFINITY) return;
    log_weights_.resize(tokens_.size(), Real(0));
    log_weights_.push_back(Real(log_weight));
    add_key(sampled(set)[draw], INT_MIN, rank);
  }

  const int32_t* sampled(int64_t set) const {
    return plan_.sample_keys + (key_head_ * plan_.sample_sets + set) * plan_.draws;
  }

  void set_leaf(const HyperTask& task) {
    const auto [first, near_end] = plan_.near(task.first);
    const int64_t end = plan_.causal ? std::min(task.last, plan_.nk) : near_end;
    limits_ = plan_.causal;
    for (int64_t key = first; key < end; ++key) add_key(key, Integer(key), -1);
    // Without a near key there is nothing for a sink to be counted twice by.
    if (plan_.samples_by_leaf) {
      for (int64_t sink = 0; sink < plan_.sinks; ++sink) {
        const bool near = sink >= first && (plan_.causal || sink < near_end);
        if (!near) add_key(sink, INT_MIN, -1);
      }
      const int64_t set = HyperPlan::floor_div(task.first, plan_.leaf_size) - plan_.first_leaf();
      sound_ &= set >= 0 && set < plan_.sample_sets;
      hides_ = plan_.levels > 0 && plan_.draws > 0;
      const int32_t* rank = plan_.key_rank + head_ * plan_.levels * plan_.nk;
      for (int64_t draw = 0; sound_ && draw < plan_.draws; ++draw) {
        const int64_t key = sampled(set)[draw];
        sound_ &= key >= 0 && key < plan_.nk;
        if (sound_) add_sample(set, draw, hides_ ? Integer(rank[key]) : Integer(-1));
      }
    }
    const int64_t rows = plan_.group * (task.last - task.first), bands = head_ * plan_.levels * plan_.rows();
    limit_.clear();
    hidden_from_.clear();
    hidden_to_.clear();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = task.first + r % (task.last - task.first);
      const int64_t row = r / (task.last - task.first) * plan_.nq + position - plan_.corner();
      rows_.push_back(int32_t(row));
      limit_.push_back(Integer(position + 1));
      hidden_from_.push_back(hides_ ? Integer(plan_.band_start[bands + row]) : Integer(0));
      hidden_to_.push_back(hides_ ? Integer(plan_.band_end[bands + row]) : Integer(0));
    }
    finish_weights();
  }

  void set_block(const HyperTask& task) {
    const int64_t at = head_ * plan_.num_tiles + task.tile;
    const int64_t level = plan_.block_first[at] / plan_.nk, first = plan_.block_first[at] % plan_.nk;
    const int64_t keys = (head_ * plan_.levels + level) * plan_.nk;
    const int64_t bands = (head_ * plan_.levels + level) * plan_.rows();
    const int32_t* rows = plan_.block_rows + at * plan_.tile_rows;
    const bool near = plan_.samples_by_leaf && !plan_.causal;
    int64_t least = plan_.nk, most = 0;
    limit_.clear();
    hidden_from_.clear();
    hidden_to_.clear();
    for (int64_t place = task.first; place < task.last; ++place) {
      const int64_t row = rows[place];
      if (row < 0) continue;
      sound_ &= row < plan_.rows();
      if (!sound_) return;
      const int64_t end = plan_.band_end[bands + row];
      const auto exact = near ? plan_.near(row % plan_.nq + plan_.corner()) : std::pair<int64_t, int64_t>{0, 0};
      rows_.push_back(int32_t(row));
      limit_.push_back(Integer(end));
      hidden_from_.push_back(Integer(exact.first));
      hidden_to_.push_back(Integer(exact.second));
      least = std::min(least, end);
      most = std::max(most, end);
    }
    const int64_t last = std::min({first + plan_.block_size, most, plan_.nk});
    limits_ = least < last;
    hides_ = near;
    for (int64_t rank = first; rank < last; ++rank) {
      const int32_t token = plan_.key_order[keys + rank];
      add_key(token, Integer(rank), near ? Integer(token) : Integer(-1));
    }
    if (!plan_.samples_by_leaf) {
      const int64_t set = plan_.block_sample[task.tile];
      sound_ &= set >= 0 && set < plan_.sample_sets;
      for (int64_t draw = 0; sound_ && draw < plan_.draws; ++draw) {
        const int64_t key = sampled(set)[draw];
        sound_ &= key >= 0 && key < plan_.nk;
        if (!sound_) break;
        // All rows of a tile with samples of its own have the same band.
        const int64_t rank = plan_.key_rank[keys + key];
        if (rank < first || rank >= most) add_sample(set, draw, -1);
      }
    }
    finish_weights();
  }

  void finish_weights() {
    if (!log_weights_.empty()) log_weights_.resize(tokens_.size(), Real(0));
  }

  const HyperCall<Value>& call_;
  const HyperPlan& plan_;
  bool sound_ = true, limits_ = false, hides_ = false;
  int64_t head_ = 0, sample_ = 0, key_head_ = 0;
  std::vector<int32_t> rows_, tokens_;
  std::vector<Real> log_weights_;
  std::vector<Integer> place_, rank_, limit_, hidden_from_, hidden_to_;
  std::vector<const Value*> queries_;
};

}  // namespace ea::cpu
