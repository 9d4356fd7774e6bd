#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "cpu/hyper_run.h"
#include "cpu/scratch.h"

#define EA_BODY "cpu/tile_passes.inl"
#include "cpu/for_each_isa.h"

namespace ea::cpu {
namespace {

// Gradients of keys and values that are held before they are added up, in numbers.
constexpr int64_t kHeldNumbers = 4 << 20;

// A thread adds up so many numbers of every row.
constexpr int64_t kSlice = 32;

// What a task gives to the keys and values of its tile.
template <typename Real>
struct Contribution {
  int64_t head;
  std::vector<int32_t> tokens;
  std::unique_ptr<Real[]> grad_keys, grad_values;
};

// One thread's memory, and its way from a task to a call of the kernel.
template <typename Value>
class Worker {
 public:
  using Real = RealOf<Value>;

  explicit Worker(const HyperBackward<Value>& pass)
      : pass_(pass), plan_(pass.call), scratch_(arrays(pass.call)) {}

  bool run(const HyperTask& task, Contribution<Real>& result) {
    if (!plan_.set(task, tile_)) return false;
    plan_.point(pass_.grad_out, grad_outs_);
    plan_.point(pass_.grad_query, grad_queries_);
    plan_.point(pass_.lse, from_);
    for (int64_t r = 0; r < tile_.rows; ++r) lses_[r] = *from_[r];
    plan_.point(pass_.delta, from_);
    for (int64_t r = 0; r < tile_.rows; ++r) deltas_[r] = *from_[r];
    for (int64_t r = tile_.rows; r < whole_blocks(tile_.rows); ++r) lses_[r] = deltas_[r] = 0;
    tile_.grad_outs = grad_outs_.data();
    tile_.grad_queries = grad_queries_.data();
    tile_.lses = lses_;
    tile_.deltas = deltas_;
    result.head = task.head;
    result.tokens = plan_.tokens();
    result.grad_keys.reset(new Real[tile_.columns * padded_width(tile_.dim)]);
    result.grad_values.reset(new Real[tile_.columns * padded_width(tile_.value_dim)]);
    tile_.grad_keys = result.grad_keys.get();
    tile_.grad_values = result.grad_values.get();
    EA_DISPATCH(differentiate_tile<Value>)(tile_);
    return true;
  }

 private:
  std::vector<std::pair<Real**, int64_t>> arrays(const HyperCall<Value>& call) {
    const int64_t rows = whole_blocks(std::max(kHyperRows, call.plan.group));
    const int64_t key_width = padded_width(call.dim), value_width = padded_width(call.value_dim);
    return {{&tile_.queries_by_dim, rows * call.dim},
            {&tile_.keys, kTileBlock * key_width},
            {&tile_.values, kTileBlock * value_width},
            {&tile_.scores, kTileBlock * kTileBlock},
            {&tile_.grad_scores, kTileBlock * kTileBlock},
            {&tile_.grad_outs_by_dim, rows * call.value_dim},
            {&tile_.query_rows, rows * key_width},
            {&tile_.grad_query_rows, rows * key_width},
            {&tile_.grad_out_rows, rows * value_width},
            {&lses_, rows},
            {&deltas_, rows}};
  }

  const HyperBackward<Value>& pass_;
  TileOfPlan<Value> plan_;
  DifferentiateTile<Value> tile_{};
  Real *lses_ = nullptr, *deltas_ = nullptr;
  Scratch<Real> scratch_;
  std::vector<const Value*> grad_outs_;
  std::vector<Real*> grad_queries_;
  std::vector<const Real*> from_;
};

// Adds numbers [begin, end) of every row to the tokens of a head that the rows are about.
template <typename Real>
void add_rows(
    const std::vector<int32_t>& tokens, const Real* rows, int64_t row_step, Real* head,
    int64_t token_step, int64_t begin, int64_t end) {
  for (size_t t = 0; t < tokens.size(); ++t) {
    Real* to = head + tokens[t] * token_step;
    const Real* from = rows + int64_t(t) * row_step;
    for (int64_t d = begin; d < end; ++d) to[d] += from[d];
  }
}

// Adds up what tasks gave, in their order: a number is added to by one thread, whatever their number.
template <typename Value>
void add_contributions(
    const HyperBackward<Value>& pass, const std::vector<Contribution<RealOf<Value>>>& results) {
  const HyperPlan& plan = pass.call.plan;
  const int64_t slices = (std::max(pass.call.dim, pass.call.value_dim) + kSlice - 1) / kSlice;
  torch::stable::parallel_for(0, plan.heads() * slices, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t head = i / slices, begin = i % slices * kSlice, end = begin + kSlice;
      const int64_t sample = head / plan.key_heads, key_head = head % plan.key_heads;
      for (const auto& result : results) {
        if (result.head != head) continue;
        add_rows(result.tokens, result.grad_keys.get(), padded_width(pass.call.dim),
                 pass.grad_key.at(sample, key_head, 0), pass.grad_key.token, begin,
                 std::min(end, pass.call.dim));
        add_rows(result.tokens, result.grad_values.get(), padded_width(pass.call.value_dim),
                 pass.grad_value.at(sample, key_head, 0), pass.grad_value.token, begin,
                 std::min(end, pass.call.value_dim));
      }
    }
  });
}

}  // namespace

template <typename Value>
bool run_hyper(const HyperBackward<Value>& pass) {
  using Real = RealOf<Value>;
  std::vector<std::unique_ptr<Worker<Value>>> workers(torch::stable::get_num_threads());
  std::atomic<bool> sound{true};
  const int64_t width = padded_width(pass.call.dim) + padded_width(pass.call.value_dim);
  for (const auto& tasks : phases(pass.call.plan, kHyperRows)) {
    for (size_t first = 0, last = 0; first < tasks.size(); first = last) {
      int64_t held = 0;
      while (last < tasks.size() && (last == first || held < kHeldNumbers)) {
        held += most_columns(pass.call.plan, tasks[last++]) * width;
      }
      std::vector<Contribution<Real>> results(last - first);
      std::atomic<int64_t> next{0};
      const int64_t threads = std::min<int64_t>(workers.size(), results.size());
      torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        auto& worker = workers[begin];
        if (!worker) worker = std::make_unique<Worker<Value>>(pass);
        for (int64_t i = next++; i < int64_t(results.size()); i = next++) {
          if (!worker->run(tasks[first + i], results[i])) sound = false;
        }
      });
      if (!sound) return false;
      add_contributions(pass, results);
    }
  }
  return true;
}

template bool run_hyper(const HyperBackward<float>&);
template bool run_hyper(const HyperBackward<double>&);
template bool run_hyper(const HyperBackward<BFloat16>&);
template bool run_hyper(const HyperBackward<Half>&);

}  // namespace ea::cpu
