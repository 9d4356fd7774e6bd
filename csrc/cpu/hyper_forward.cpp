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

// One thread's memory, and its way from a task to a call of the kernel.
template <typename Value>
class Worker {
 public:
  using Real = RealOf<Value>;

  explicit Worker(const HyperForward<Value>& pass)
      : pass_(pass), plan_(pass.call), scratch_(arrays(pass.call)) {}

  bool run(const HyperTask& task, bool merges) {
    if (!plan_.set(task, tile_)) return false;
    plan_.point(pass_.out, outs_);
    plan_.point(pass_.lse, lses_);
    tile_.outs = outs_.data();
    tile_.lses = lses_.data();
    tile_.merges = merges;
    EA_DISPATCH(attend_tile<Value>)(tile_);
    return true;
  }

 private:
  std::vector<std::pair<Real**, int64_t>> arrays(const HyperCall<Value>& call) {
    const int64_t rows = whole_blocks(std::max(kHyperRows, call.plan.group));
    const int64_t value_width = padded_width(call.value_dim);
    return {{&tile_.queries_by_dim, rows * call.dim},
            {&tile_.keys, kTileBlock * padded_width(call.dim)},
            {&tile_.values, kTileBlock * value_width},
            {&tile_.scores, kTileBlock * kTileBlock},
            {&tile_.weighted, rows * value_width},
            {&tile_.max, rows},
            {&tile_.sum, rows},
            {&tile_.fade, rows}};
  }

  const HyperForward<Value>& pass_;
  TileOfPlan<Value> plan_;
  AttendTile<Value> tile_{};
  Scratch<Real> scratch_;
  std::vector<Real*> outs_, lses_;
};

}  // namespace

template <typename Value>
bool run_hyper(const HyperForward<Value>& pass) {
  std::vector<std::unique_ptr<Worker<Value>>> workers(torch::stable::get_num_threads());
  std::atomic<bool> sound{true};
  bool merges = false;
  // A query is in one task of a phase, so that no two threads write the same row.
  for (const auto& tasks : phases(pass.call.plan, kHyperRows)) {
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min<int64_t>(workers.size(), tasks.size());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      auto& worker = workers[begin];
      if (!worker) worker = std::make_unique<Worker<Value>>(pass);
      for (int64_t i = next++; i < int64_t(tasks.size()); i = next++) {
        if (!worker->run(tasks[i], merges)) sound = false;
      }
    });
    merges = true;
  }
  return sound;
}

template bool run_hyper(const HyperForward<float>&);
template bool run_hyper(const HyperForward<double>&);
template bool run_hyper(const HyperForward<BFloat16>&);
template bool run_hyper(const HyperForward<Half>&);

}  // namespace ea::cpu
