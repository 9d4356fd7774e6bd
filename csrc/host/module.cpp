#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/head_map.h"
#include "common/online_softmax.h"
#include "cpu/isa.h"

// No tensors here: facts about the build, and doors through which Python tests what is in common/.

namespace py = pybind11;

namespace {

using State = std::pair<double, double>;

ea::SoftmaxState<double> state_of(const State& pair) { return {pair.first, pair.second}; }

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = "GCC " __VERSION__;
#if defined(__clang__)
  facts["compiler"] = __VERSION__;
#endif
  facts["flags"] = EA_FLAGS;
  facts["instruction_set"] = ea::cpu::name(ea::cpu::best_isa());
  facts["torch_target"] = std::to_string((EA_TORCH_TARGET >> 56) & 0xff) + "." +
                          std::to_string((EA_TORCH_TARGET >> 48) & 0xff);
  facts["cuda"] = bool(EA_WITH_CUDA);
  return facts;
}

std::pair<std::vector<int32_t>, std::vector<int32_t>> head_groups(
    const std::vector<int32_t>& index, int num_heads) {
  for (const int32_t head : index) {
    if (head < 0 || head >= num_heads) {
      throw std::invalid_argument(
          "index holds " + std::to_string(head) + "; every entry must lie in [0, num_heads).");
    }
  }
  std::vector<int32_t> starts(num_heads + 1), members(index.size());
  ea::invert_head_index(
      index.data(), int(index.size()), num_heads, starts.data(), members.data());
  return {starts, members};
}

std::pair<std::vector<double>, double> merge_weights(const std::vector<double>& lses) {
  std::vector<double> weights(lses.size());
  const double lse = ea::merge_weights(lses.data(), int(lses.size()), weights.data());
  return {weights, lse};
}

State merge_softmax(const State& a, const State& b) {
  const auto merged = ea::merge(state_of(a), state_of(b));
  return {merged.max, merged.sum};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build facts of the native code, and its tensor-free parts for tests.";
  m.def("build_facts", &build_facts, "Compiler, flags, instruction set, and what was built in.");
  m.def("head_groups", &head_groups, py::arg("index"), py::arg("num_heads"),
        "The inverse of a head index as (starts, members).");
  m.def("merge_weights", &merge_weights, py::arg("lses"),
        "The weights of partial results in their merger, and its log-sum-exp.");
  m.def("merge_softmax", &merge_softmax, py::arg("a"), py::arg("b"),
        "The softmax state (max, sum) of the scores of both.");
  m.def("log_sum_exp", [](const State& s) { return ea::log_sum_exp(state_of(s)); },
        py::arg("state"), "The log-sum-exp of a softmax state (max, sum).");
}
