#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

// Walking the rows of several strided tensors of one shape together.

namespace ea::cpu {

// One axis of the walk: its length, and the step of every tensor along it, in elements.
struct Axis {
  int64_t size;
  std::vector<int64_t> steps;
};

// Rows in the memory order of the first tensor, with neighbouring axes joined where every tensor
// allows it, so that contiguous tensors are walked as one single run.
class RowWalk {
 public:
  explicit RowWalk(std::vector<Axis> axes) {
    axes.erase(std::remove_if(axes.begin(), axes.end(), [](const Axis& a) { return a.size == 1; }),
               axes.end());
    std::stable_sort(axes.begin(), axes.end(),
                     [](const Axis& a, const Axis& b) { return a.steps[0] > b.steps[0]; });
    for (Axis& axis : axes) {
      if (!axes_.empty() && joins(axes_.back(), axis)) {
        axis.size *= axes_.back().size;
        axes_.back() = std::move(axis);
      } else {
        axes_.push_back(std::move(axis));
      }
    }
  }

  int64_t rows() const {
    int64_t rows = 1;
    for (const Axis& axis : axes_) rows *= axis.size;
    return rows;
  }

  // The step of tensor `t` from a row to the next one of the same run.
  int64_t step(int64_t t) const { return axes_.empty() ? 0 : axes_.back().steps[t]; }

  // Calls visit(offsets, count) for each run of rows in [begin, end): where the run starts in every
  // tensor, in elements, and how many rows it has.
  template <typename Visit>
  void runs(int64_t begin, int64_t end, int64_t num_tensors, const Visit& visit) const {
    const int64_t longest = axes_.empty() ? 1 : axes_.back().size;
    std::vector<int64_t> offsets(num_tensors);
    while (begin < end) {
      std::fill(offsets.begin(), offsets.end(), 0);
      int64_t rest = begin;
      for (auto axis = axes_.rbegin(); axis != axes_.rend(); ++axis) {
        const int64_t index = rest % axis->size;
        rest /= axis->size;
        for (int64_t t = 0; t < num_tensors; ++t) offsets[t] += index * axis->steps[t];
      }
      const int64_t count = std::min(longest - begin % longest, end - begin);
      visit(offsets.data(), count);
      begin += count;
    }
  }

 private:
  static bool joins(const Axis& outer, const Axis& inner) {
    for (size_t t = 0; t < inner.steps.size(); ++t) {
      if (outer.steps[t] != inner.size * inner.steps[t]) return false;
    }
    return true;
  }

  std::vector<Axis> axes_;
};

}  // namespace ea::cpu
