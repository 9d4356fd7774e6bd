#include "cpu/selective_run.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <memory>

#include "cpu/merge_states.h"
#include "cpu/selective.h"
#include "cpu/selective_plan.h"

#define EA_BODY "cpu/selective.inl"
#include "cpu/for_each_isa.h"

namespace ea::cpu {
namespace {

// Below this much work for a thread, waking another one costs more than it brings.
constexpr int64_t kBytesPerThread = 128 << 10;

// Candidates of the rows of a group, from one part or several.
template <typename Real>
struct Sifted {
  std::vector<Candidate<Real>> candidates;
  std::vector<int64_t> starts;  // of each row, and the end; empty where there is nothing
};

// Scratch in whole cache lines.
template <typename Real>
class Scratch {
 public:
  Real* take(int64_t size) {
    blocks_.emplace_back(new Real[padded(size) + kLine]);
    Real* data = blocks_.back().get();
    const int64_t misaligned = reinterpret_cast<uintptr_t>(data) / sizeof(Real) % kLine;
    return data + (kLine - misaligned) % kLine;
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(Real);
  std::vector<std::unique_ptr<Real[]>> blocks_;
};

template <typename Value>
class Selection {
 public:
  using Real = RealOf<Value>;

  explicit Selection(const SelectiveCall<Value>& call) : call_(call) {
    for (int64_t b = 0; b < call.batch; ++b) {
      plan_.add_sequence(of_sequence(call.q_to_k, b), call.num_key_heads, b, call.lengths[b],
                         call.tokens, call.window_left);
    }
    plan_.split(call.key.dim * int64_t(sizeof(Value)));
    sifted_.resize(plan_.parts.size());
    states_.resize(plan_.partial_rows);
    floors_.reset(new std::atomic<Real>[plan_.rows.size()]);
    for (size_t r = 0; r < plan_.rows.size(); ++r) floors_[r] = Real(-INFINITY);
  }

  void run() {
    const int64_t bytes = plan_.tokens_to_read * call_.key.dim * int64_t(sizeof(Value));
    const int64_t threads =
        std::min<int64_t>(torch::stable::get_num_threads(), 1 + bytes / kBytesPerThread);
    in_turn(threads, plan_.parts.size(), [this] { return Sifter(*this); });
    in_turn(threads, plan_.rows.size(), [this] { return Reader(*this); });
  }

 private:
  static const std::vector<int32_t>& of_sequence(
      const std::vector<std::vector<int32_t>>& maps, int64_t sequence) {
    return maps[maps.size() == 1 ? 0 : sequence];
  }

  // Threads take items in turn, each with a worker of its own.
  template <typename MakeWorker>
  static void in_turn(int64_t threads, int64_t count, const MakeWorker& make_worker) {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
      auto worker = make_worker();
      for (int64_t i = next++; i < count; i = next++) worker.run(i);
    });
  }

  void set_sequence(DecodePart<Value>& part, int64_t sequence) const {
    part.key.only_page = part.value.only_page = sequence;
    part.key.pages = part.value.pages = call_.pages(sequence);
  }

  // Scores the keys of a part. With a number to select, the candidates of a group are kept from one
  // part to the next: the more of its keys a thread has seen, the fewer of the next are candidates.
  class Sifter {
   public:
    explicit Sifter(Selection& all) : all_(all), call_(all.call_) {
      const int64_t rows = all.plan_.most_rows;
      part_.key = call_.key;
      part_.window_left = call_.window_left;
      part_.scale = call_.scale;
      part_.softcap = call_.softcap;
      part_.query_step = padded(call_.key.dim);
      part_.packed_queries = scratch_.take(rows * part_.query_step);
      part_.scores = scratch_.take(rows * kDecodeBlock);
      part_.max = scratch_.take(rows);
      part_.sum = scratch_.take(rows);
      part_.floors = scratch_.take(rows);
      part_.key_heads = &readers_;
      part_.most = call_.top_values;
      part_.room = part_.most ? std::min(all.plan_.longest, 2 * part_.most + 2 * kDecodeBlock)
                              : all.plan_.longest_split;
      candidates_.reset(new Candidate<Real>[rows * part_.room]);
      counts_.resize(rows);
      part_.candidates = candidates_.get();
      part_.counts = counts_.data();
      if (call_.key.dim_step != 1) gathered_.resize(kDecodeBlock * call_.key.dim);
      part_.gathered = gathered_.data();
    }

    ~Sifter() { leave(); }

    void run(int64_t index) {
      const auto [g, split] = all_.plan_.parts[index];
      const ScoreGroup& group = all_.plan_.groups[g];
      if (&group != group_) enter(group);
      part_.begin = group.begin + split * group.split_tokens;
      part_.end = std::min(group.end, part_.begin + group.split_tokens);
      for (int64_t r = 0; r < part_.rows && part_.most; ++r) {
        // What another thread has found holds here too; as its tokens may come later, what equals
        // its floor may still be selected.
        const Real floor = all_.floors_[group.first_row + r].load(std::memory_order_relaxed);
        part_.floors[r] = std::max(part_.floors[r], std::nextafter(floor, Real(-INFINITY)));
      }
      EA_DISPATCH(score_part<Value>)(part_);
      index_ = index;
      SoftmaxState<Real>* states = &all_.states_[group.first_state + split * part_.rows];
      for (int64_t r = 0; r < part_.rows; ++r) {
        states[r] = {part_.max[r], part_.sum[r]};
        auto& floor = all_.floors_[group.first_row + r];
        if (part_.most && part_.floors[r] > floor.load(std::memory_order_relaxed)) {
          floor.store(part_.floors[r], std::memory_order_relaxed);
        }
      }
      // By mass, parts are left apart: sums would depend on which thread had which.
      if (!part_.most) leave();
    }

   private:
    void enter(const ScoreGroup& group) {
      leave();
      group_ = &group;
      all_.set_sequence(part_, group.sequence);
      part_.rows = group.rows();
      part_.tokens = group.tokens;
      part_.newest = group.newest;
      part_.margin = std::log(Real(call_.dropped_mass) / Real(group.end));
      readers_ = {group.key_head, 0, part_.rows};
      queries_.resize(part_.rows);
      for (int64_t r = 0; r < part_.rows; ++r) {
        queries_[r] = call_.query + group.sequence * call_.query_batch_step +
                      group.heads[r / group.tokens] * call_.query_head_step +
                      (group.first_token + r % group.tokens) * call_.query_token_step;
        part_.floors[r] = Real(-INFINITY);
        part_.counts[r] = 0;
      }
      part_.queries = queries_.data();
    }

    // What is held is put where the last of its parts has its place.
    void leave() {
      if (!group_) return;
      Sifted<Real>& sifted = all_.sifted_[index_];
      for (int64_t r = 0; r < part_.rows; ++r) {
        const Candidate<Real>* first = part_.candidates + r * part_.room;
        sifted.starts.push_back(sifted.candidates.size());
        sifted.candidates.insert(sifted.candidates.end(), first, first + part_.counts[r]);
      }
      sifted.starts.push_back(sifted.candidates.size());
      group_ = nullptr;
    }

    Selection& all_;
    const SelectiveCall<Value>& call_;
    ScorePart<Value> part_{};
    const ScoreGroup* group_ = nullptr;
    int64_t index_ = 0;
    Scratch<Real> scratch_;
    std::unique_ptr<Candidate<Real>[]> candidates_;
    std::vector<int64_t> counts_;
    std::vector<Value> gathered_;
    std::vector<const Value*> queries_;
    HeadReaders readers_{};
  };

  // Reads the values of one query.
  class Reader {
   public:
    explicit Reader(const Selection& all) : all_(all), call_(all.call_) {
      row_.value = call_.value;
      row_.rows = 1;
      row_.weighted_step = padded(call_.value.dim);
      row_.weighted = scratch_.take(row_.weighted_step);
      row_.scores = scratch_.take(kDecodeBlock);
      row_.weights = scratch_.take(kDecodeBlock);
      row_.sum = scratch_.take(1);
      row_.fade = scratch_.take(1);
      if (call_.value.dim_step != 1) gathered_.resize(kDecodeBlock * call_.value.dim);
      row_.gathered = gathered_.data();
    }

    void run(int64_t index) {
      const auto [g, r] = all_.plan_.rows[index];
      const ScoreGroup& group = all_.plan_.groups[g];
      const int64_t head = group.heads[r / group.tokens];
      const int64_t token = group.first_token + r % group.tokens;
      const int64_t at = (group.sequence * call_.heads + head) * call_.tokens + token;
      row_.state = gather(group, r);
      call_.lse[at] = log_sum_exp(row_.state);
      row_.count = select();
      std::sort(candidates_.begin(), candidates_.begin() + row_.count,
                [](const auto& a, const auto& b) { return a.token < b.token; });
      row_.selected = candidates_.data();
      row_.value_head = of_sequence(call_.q_to_v, group.sequence)[head];
      row_.out = call_.out + ((group.sequence * call_.tokens + token) * call_.heads + head) *
                                 call_.value.dim;
      row_.kept = call_.kept + at;
      all_.set_sequence(row_, group.sequence);
      EA_DISPATCH(attend_to_selected<Value>)(row_);
    }

   private:
    // Candidates of all splits, and the softmax of all keys.
    SoftmaxState<Real> gather(const ScoreGroup& group, int64_t r) {
      candidates_.clear();
      SoftmaxState<Real> state;
      for (int64_t s = 0; s < group.splits; ++s) {
        state = merge(state, all_.states_[group.first_state + s * group.rows() + r]);
        const Sifted<Real>& sifted = all_.sifted_[group.first_part + s];
        if (sifted.starts.empty()) continue;
        const auto first = sifted.candidates.begin();
        candidates_.insert(candidates_.end(), first + sifted.starts[r], first + sifted.starts[r + 1]);
      }
      return state;
    }

    int64_t select() {
      const int64_t count = candidates_.size();
      if (call_.top_values) {
        return select_best(candidates_.data(), count, double(call_.top_values),
                           [](auto* first, auto* last) { return double(last - first); });
      }
      const auto mass = [this](const Candidate<Real>* first, const Candidate<Real>* last) {
        double sum = 0;
        for (; first < last; ++first) sum += std::exp(first->score - row_.state.max);
        return sum / row_.state.sum;
      };
      return select_best(candidates_.data(), count, 1 - call_.dropped_mass, mass);
    }

    const Selection& all_;
    const SelectiveCall<Value>& call_;
    SelectedRow<Value> row_{};
    Scratch<Real> scratch_;
    std::vector<Candidate<Real>> candidates_;
    std::vector<Value> gathered_;
  };

  const SelectiveCall<Value>& call_;
  ScorePlan plan_;
  std::vector<Sifted<Real>> sifted_;        // of each part
  std::vector<SoftmaxState<Real>> states_;  // of each row of each part
  std::unique_ptr<std::atomic<Real>[]> floors_;  // of each row, scores that no selection goes below
};

}  // namespace

template <typename Value>
void run_selective(const SelectiveCall<Value>& call) {
  Selection<Value>(call).run();
}

template void run_selective(const SelectiveCall<float>&);
template void run_selective(const SelectiveCall<double>&);
template void run_selective(const SelectiveCall<BFloat16>&);
template void run_selective(const SelectiveCall<Half>&);

}  // namespace ea::cpu
