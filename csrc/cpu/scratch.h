#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace ea::cpu {

// Several arrays of one thread in one piece of memory, from a cache line on. Sizes in multiples of a
// line keep all of them on lines.
template <typename Real>
class Scratch {
 public:
  explicit Scratch(const std::vector<std::pair<Real**, int64_t>>& arrays) {
    constexpr int64_t line = 64 / sizeof(Real);
    int64_t total = line;
    for (const auto& array : arrays) total += array.second;
    memory_.reset(new Real[total]);
    const int64_t misaligned = reinterpret_cast<uintptr_t>(memory_.get()) / sizeof(Real) % line;
    Real* at = memory_.get() + (line - misaligned) % line;
    for (const auto& [place, size] : arrays) {
      *place = at;
      at += size;
    }
  }

 private:
  std::unique_ptr<Real[]> memory_;
};

}  // namespace ea::cpu
