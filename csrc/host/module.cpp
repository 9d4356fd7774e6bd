#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/counting_sort.h"
#include "common/head_map.h"
#include "common/lsh.h"
#include "common/online_softmax.h"
#include "common/selection.h"
#include "cpu/decode.h"
#include "cpu/head_families.h"
#include "cpu/merge_states.h"
#include "host/cuda_door.h"
#include "host/decode_door.h"
#include "host/tile_door.h"

#define EA_BODY "host/probes.inl"
#include "cpu/for_each_isa.h"

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

uint32_t sign_code(const std::vector<float>& projections, const std::vector<float>& thresholds) {
  if (projections.size() != thresholds.size() || projections.size() > 16) {
    throw std::invalid_argument("pass as many thresholds as projections, at most 16.");
  }
  return ea::sign_code(projections.data(), thresholds.data(), int(projections.size()));
}

std::pair<std::vector<int32_t>, std::vector<int32_t>> counting_sort(
    const std::vector<int32_t>& bins, int num_bins) {
  for (const int32_t bin : bins) {
    if (bin < 0 || bin >= num_bins) throw std::invalid_argument("bins must lie in [0, num_bins).");
  }
  std::vector<int32_t> starts(num_bins + 1), sorted(bins.size());
  ea::counting_sort(
      int64_t(bins.size()), num_bins, [](int64_t i) { return int32_t(i); },
      [&](int32_t item) { return bins[item]; }, starts.data(), sorted.data());
  return {sorted, starts};
}

using ea::cpu::Isa;

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Isa isa : ea::cpu::kEveryIsa) {
    if (isa <= ea::cpu::best_isa()) names.emplace_back(ea::cpu::name(isa));
  }
  return names;
}

Isa isa_of(const std::string& name) {
  for (const Isa isa : ea::cpu::kEveryIsa) {
    if (name == ea::cpu::name(isa) && isa <= ea::cpu::best_isa()) return isa;
  }
  throw std::invalid_argument("this processor does not run " + name + ".");
}

std::pair<std::vector<float>, float> merge_row(
    const std::string& isa, const std::vector<std::vector<float>>& parts,
    std::vector<float> lses) {
  if (parts.empty() || parts.size() != lses.size()) {
    throw std::invalid_argument("pass at least one part, and one lse for each.");
  }
  std::vector<const float*> part_at, lse_at;
  for (size_t s = 0; s < parts.size(); ++s) {
    if (parts[s].size() != parts[0].size()) throw std::invalid_argument("parts differ in length.");
    part_at.push_back(parts[s].data());
    lse_at.push_back(&lses[s]);
  }
  std::vector<float> out(parts[0].size()), weights(parts.size());
  const std::vector<int64_t> steps(parts.size(), 0);
  float lse = 0;
  ea::cpu::MergeRun<float, float> run{};
  run.rows = 1;
  run.count = int64_t(parts.size());
  run.dim = int64_t(out.size());
  run.parts = part_at.data();
  run.lses = lse_at.data();
  run.part_steps = run.lse_steps = steps.data();
  run.out = out.data();
  run.lse = &lse;
  run.weights = weights.data();
  EA_SELECT(isa_of(isa), merge_rows<float, float>)(run);
  return {out, lse};
}

std::vector<float> round_trip(
    const std::string& isa, const std::string& dtype, std::vector<float> values) {
  const size_t count = values.size();
  values.resize((count + 15) / 16 * 16);  // A whole number of the widest vectors.
  if (dtype == "bfloat16") {
    EA_SELECT(isa_of(isa), round_trip<ea::cpu::BFloat16>)(values.data(), values.size());
  } else if (dtype == "float16") {
    EA_SELECT(isa_of(isa), round_trip<ea::cpu::Half>)(values.data(), values.size());
  } else {
    throw std::invalid_argument("dtype is " + dtype + "; pass bfloat16 or float16.");
  }
  values.resize(count);
  return values;
}

// Each family as (query heads, key heads, value heads), the last two as (head, first, count), and
// the positions that value heads count.
py::list head_families(
    const std::vector<int32_t>& q_to_k, const std::vector<int32_t>& q_to_v, int num_k_heads,
    int num_v_heads) {
  py::list result;
  for (const auto& family : ea::cpu::head_families(q_to_k, q_to_v, num_k_heads, num_v_heads)) {
    py::list keys, values;
    for (const auto& x : family.keys) keys.append(py::make_tuple(x.head, x.first, x.count));
    for (const auto& x : family.values) values.append(py::make_tuple(x.head, x.first, x.count));
    result.append(py::make_tuple(family.heads, keys, values, family.value_members));
  }
  return result;
}

// The tokens of the best scores whose weights, one for each token, are `enough` together.
std::vector<int32_t> select_best(
    const std::vector<double>& scores, const std::vector<double>& weights, double enough) {
  if (scores.size() != weights.size()) throw std::invalid_argument("pass one weight per score.");
  std::vector<ea::Candidate<double>> candidates;
  for (size_t t = 0; t < scores.size(); ++t) candidates.push_back({scores[t], int32_t(t)});
  const auto measure = [&](const auto* first, const auto* last) {
    double sum = 0;
    for (; first < last; ++first) sum += weights[first->token];
    return sum;
  };
  const int64_t count =
      ea::select_best(candidates.data(), int64_t(candidates.size()), enough, measure);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back(candidates[i].token);
  return tokens;
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
  m.def("sign_code", &sign_code, py::arg("projections"), py::arg("thresholds"),
        "The Gray rank of the bits projection > threshold.");
  m.def("counting_sort", &counting_sort, py::arg("bins"), py::arg("num_bins"),
        "Items in the order of their bins as (sorted, starts of the bins).");
  m.def("instruction_sets", &instruction_sets, "Those that this processor runs, widest last.");
  m.def("merge_row", &merge_row, py::arg("isa"), py::arg("parts"), py::arg("lses"),
        "One row of merge_states as (out, lse), on one instruction set.");
  m.def("head_families", &head_families, py::arg("q_to_k"), py::arg("q_to_v"),
        py::arg("num_k_heads"), py::arg("num_v_heads"),
        "The query heads that are served together, with the cached heads that they read.");
  m.def("decode_part",
        [](const std::string& isa, const std::string& dtype, const ea::host::Rows& queries,
           const ea::host::Rows& keys, const ea::host::Rows& values, int64_t tokens,
           int64_t window_left, float scale, float softcap) {
          return ea::host::decode_part(isa_of(isa), dtype, queries, keys, values, tokens,
                                       window_left, scale, softcap);
        },
        py::arg("isa"), py::arg("dtype"), py::arg("queries"), py::arg("keys"), py::arg("values"),
        py::arg("tokens"), py::arg("window_left"), py::arg("scale"), py::arg("softcap"),
        "Attention of some queries to the rows of one head as (outs, lses).");
  py::class_<ea::host::TileCase>(m, "TileCase", "Queries, and the keys that they share.")
      .def(py::init<>())
      .def_readwrite("queries", &ea::host::TileCase::queries)
      .def_readwrite("keys", &ea::host::TileCase::keys)
      .def_readwrite("values", &ea::host::TileCase::values)
      .def_readwrite("tokens", &ea::host::TileCase::tokens)
      .def_readwrite("places", &ea::host::TileCase::places)
      .def_readwrite("limits", &ea::host::TileCase::limits)
      .def_readwrite("ranks", &ea::host::TileCase::ranks)
      .def_readwrite("hidden_from", &ea::host::TileCase::hidden_from)
      .def_readwrite("hidden_to", &ea::host::TileCase::hidden_to)
      .def_readwrite("log_weights", &ea::host::TileCase::log_weights)
      .def_readwrite("scale", &ea::host::TileCase::scale);
  m.def("attend_tile", [](const std::string& isa, const ea::host::TileCase& tile) {
          return ea::host::attend_tile(isa_of(isa), tile);
        }, py::arg("isa"), py::arg("tile"), "Attention of a tile as (outs, lses).");
  m.def("differentiate_tile",
        [](const std::string& isa, const ea::host::TileCase& tile, const ea::host::Rows& grad_outs,
           const std::vector<float>& lses, const std::vector<float>& deltas) {
          return ea::host::differentiate_tile(isa_of(isa), tile, grad_outs, lses, deltas);
        },
        py::arg("isa"), py::arg("tile"), py::arg("grad_outs"), py::arg("lses"), py::arg("deltas"),
        "Its gradients of queries, and of the keys and values of each column.");
  m.def("exp", [](const std::string& isa, const std::vector<float>& values) {
          return ea::host::exp_of(isa_of(isa), values);
        }, py::arg("isa"), py::arg("values"), "exp of nothing positive, on one instruction set.");
  m.def("tanh", [](const std::string& isa, const std::vector<float>& values) {
          return ea::host::tanh_of(isa_of(isa), values);
        }, py::arg("isa"), py::arg("values"), "tanh on one instruction set.");
  m.def("round_trip", &round_trip, py::arg("isa"), py::arg("dtype"), py::arg("values"),
        "fp32 to a 16-bit type and back, on one instruction set.");
  m.def("merge_softmax", &merge_softmax, py::arg("a"), py::arg("b"),
        "The softmax state (max, sum) of the scores of both.");
  m.def("select_best", &select_best, py::arg("scores"), py::arg("weights"), py::arg("enough"),
        "The tokens of the fewest best scores that weigh enough, in no order.");
  m.def("log_sum_exp", [](const State& s) { return ea::log_sum_exp(state_of(s)); },
        py::arg("state"), "The log-sum-exp of a softmax state (max, sum).");
  ea::host::add_cuda_doors(m);
}
