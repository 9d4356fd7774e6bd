#include "cpu/decode_run.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>

#include "cpu/decode_plan.h"
#include "cpu/merge_states.h"

#define EA_BODY "cpu/decode.inl"
#include "cpu/for_each_isa.h"

namespace ea::cpu {
namespace {

// Below this much work for a thread, waking another one costs more than it brings.
constexpr int64_t kBytesPerThread = 128 << 10;

// The partial results of every split, and how many of a group are still to come.
template <typename Value>
struct Partials {
  using Real = RealOf<Value>;
  std::unique_ptr<Real[]> outs, lses;
  std::unique_ptr<std::atomic<int64_t>[]> missing;

  Partials(const DecodePlan& plan, int64_t dim)
      : outs(new Real[plan.partials * dim]),
        lses(new Real[plan.partials]),
        missing(new std::atomic<int64_t>[plan.groups.size()]) {
    for (size_t g = 0; g < plan.groups.size(); ++g) missing[g] = plan.groups[g].splits;
  }
};

// One thread's memory, and its way from a part of the plan to a call of the kernel.
template <typename Value>
class Worker {
 public:
  using Real = RealOf<Value>;

  Worker(const DecodeCall<Value>& call, const DecodePlan& plan, Partials<Value>& partials)
      : call_(call), plan_(plan), partials_(partials) {
    const int64_t rows = plan.most_rows, dim = std::max(call.key.dim, call.value.dim);
    part_.query_step = padded(call.key.dim);
    part_.weighted_step = padded(call.value.dim);
    const int64_t sizes[] = {rows * part_.query_step,    rows * kDecodeBlock, rows * kDecodeBlock,
                             rows * part_.weighted_step, padded(rows),        padded(rows),
                             padded(rows),               rows * part_.query_step};
    Real** const places[] = {&part_.packed_queries, &part_.scores, &part_.weights,
                             &part_.weighted,       &part_.max,    &part_.sum,
                             &part_.fade,           &part_.columns};
    constexpr int64_t line = 64 / sizeof(Real);
    int64_t total = line;
    for (const int64_t size : sizes) total += size;
    memory_.reset(new Real[total]);
    const int64_t misaligned = reinterpret_cast<uintptr_t>(memory_.get()) / sizeof(Real) % line;
    Real* at = memory_.get() + (line - misaligned) % line;
    for (int i = 0; i < 8; at += sizes[i++]) *places[i] = at;
    if (call.key.dim_step != 1 || call.value.dim_step != 1) {
      gathered_.reset(new Value[kDecodeBlock * dim]);
    }
    part_.gathered = gathered_.get();
    part_.window_left = call.window_left;
    part_.scale = call.scale;
    part_.softcap = call.softcap;
  }

  void run(const DecodeGroup& group, int64_t split) {
    const int64_t rows = group.rows(), dim = call_.value.dim;
    const int64_t first_partial = group.first_partial + split * rows;
    const bool whole = group.splits == 1;
    prepare(group);
    part_.begin = group.begin + split * group.split_tokens;
    part_.end = whole ? group.end : std::min(group.end, part_.begin + group.split_tokens);
    part_.partial = whole ? nullptr : partials_.outs.get() + first_partial * dim;
    lses_.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
      lses_[r] = whole ? call_.lse + lse_at(group, r) : partials_.lses.get() + first_partial + r;
    }
    part_.lses = lses_.data();
    EA_DISPATCH(decode_part<Value>)(part_);
    // Whoever finishes a group merges it, in the order of its splits.
    if (!whole && --partials_.missing[&group - plan_.groups.data()] == 0) merge(group);
  }

 private:
  void prepare(const DecodeGroup& group) {
    const HeadFamily& family = *group.family;
    part_.rows = group.rows();
    part_.tokens = group.tokens;
    part_.newest = group.newest;
    part_.key = call_.key;
    part_.value = call_.value;
    part_.key.only_page = part_.value.only_page = group.sequence;
    part_.key.pages = part_.value.pages = call_.pages(group.sequence);

    queries_.resize(part_.rows);
    outs_.resize(part_.rows);
    for (int64_t r = 0; r < part_.rows; ++r) {
      const int64_t head = family.heads[r / group.tokens];
      const int64_t token = group.first_token + r % group.tokens;
      queries_[r] = call_.query + group.sequence * call_.query_batch_step +
                    head * call_.query_head_step + token * call_.query_token_step;
      outs_[r] = call_.out +
                 ((group.sequence * call_.tokens + token) * call_.heads + head) * call_.value.dim;
    }
    part_.queries = queries_.data();
    part_.outs = outs_.data();

    keys_ = family.keys;
    values_ = family.values;
    value_rows_.clear();
    for (const int32_t position : family.value_members) {
      for (int64_t i = 0; i < group.tokens; ++i) {
        value_rows_.push_back(int32_t(position * group.tokens + i));
      }
    }
    for (auto* readers : {&keys_, &values_}) {
      for (HeadReaders& head : *readers) {
        head.first *= group.tokens;
        head.count *= group.tokens;
      }
    }
    part_.key_heads = keys_.data();
    part_.num_key_heads = keys_.size();
    part_.value_heads = values_.data();
    part_.num_value_heads = values_.size();
    part_.value_rows = value_rows_.data();
  }

  int64_t lse_at(const DecodeGroup& group, int64_t row) const {
    const int64_t head = group.family->heads[row / group.tokens];
    return (group.sequence * call_.heads + head) * call_.tokens + group.first_token +
           row % group.tokens;
  }

  void merge(const DecodeGroup& group) {
    const int64_t rows = group.rows(), dim = call_.value.dim;
    std::vector<const Real*> parts(group.splits), lses(group.splits);
    std::vector<Real> weights(group.splits);
    const std::vector<int64_t> steps(group.splits, 0);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t s = 0; s < group.splits; ++s) {
        const int64_t at = group.first_partial + s * rows + r;
        parts[s] = partials_.outs.get() + at * dim;
        lses[s] = partials_.lses.get() + at;
      }
      MergeRun<Real, Real, Value> run{
          1, group.splits, dim, parts.data(), lses.data(), steps.data(), steps.data(),
          outs_[r], call_.lse + lse_at(group, r), 0, 0, weights.data()};
      EA_DISPATCH(merge_rows<Real, Real, Value>)(run);
    }
  }

  const DecodeCall<Value>& call_;
  const DecodePlan& plan_;
  Partials<Value>& partials_;
  DecodePart<Value> part_{};
  std::unique_ptr<Real[]> memory_;
  std::unique_ptr<Value[]> gathered_;
  std::vector<const Value*> queries_;
  std::vector<Value*> outs_;
  std::vector<Real*> lses_;
  std::vector<HeadReaders> keys_, values_;
  std::vector<int32_t> value_rows_;
};

}  // namespace

template <typename Value>
void run_decode(const DecodeCall<Value>& call) {
  const DecodeSizes sizes{call.key.dim, call.value.dim, sizeof(Value), sizeof(RealOf<Value>),
                          call.value_in_key};
  DecodePlan plan;
  for (int64_t b = 0; b < call.batch; ++b) {
    const auto& families = call.families[call.families.size() == 1 ? 0 : b];
    plan.add_sequence(sizes, families, b, call.lengths[b], call.tokens, call.window_left);
  }
  plan.split(sizes);
  Partials<Value> partials(plan, call.value.dim);

  const int64_t num_parts = plan.parts.size();
  const int64_t threads = std::min<int64_t>(
      {torch::stable::get_num_threads(), num_parts, 1 + plan.bytes / kBytesPerThread});
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    Worker<Value> worker(call, plan, partials);
    for (int64_t p = next++; p < num_parts; p = next++) {
      worker.run(plan.groups[plan.parts[p].first], plan.parts[p].second);
    }
  });
}

template void run_decode(const DecodeCall<float>&);
template void run_decode(const DecodeCall<double>&);
template void run_decode(const DecodeCall<BFloat16>&);
template void run_decode(const DecodeCall<Half>&);

}  // namespace ea::cpu
