#include "cpu/selective_run.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu/merge_states.h"
#include "cpu/scratch.h"
#include "cpu/selective.h"
#include "cpu/selective_plan.h"

#define EA_BODY "cpu/selective.inl"
#include "cpu/for_each_isa.h"

namespace ea::cpu {
namespace {

// Below this much work for a thread, waking another one costs more than it brings.
constexpr int64_t kBytesPerThread = 128 << 10;

template <typename Value>
class Selection {
 public:
  using Real = RealOf<Value>;

  explicit Selection(const SelectiveCall<Value>& call) : call_(call) {
    for (int64_t b = 0; b < call.batch; ++b) {
      plan_.add_sequence(of_sequence(call.q_to_k, b), call.num_key_heads, b, call.lengths[b],
                         call.tokens, call.window_left);
    }
    plan_.split(call.key.dim * int64_t(sizeof(Value)), call.top_values);
    states_.resize(plan_.partial_rows);
    memory_.reset(new Scratch<Real>({{&scores_, plan_.most_scores}, {&tops_, plan_.most_tops}}));
  }

  void run() {
    const int64_t bytes = plan_.tokens_to_read * call_.key.dim * int64_t(sizeof(Value));
    const int64_t threads =
        std::min<int64_t>(torch::stable::get_num_threads(), 1 + bytes / kBytesPerThread);
    for (const ScoreWave& wave : plan_.waves) {
      in_turn(threads, wave.first_part, wave.end_part, [this] { return Scorer(*this); });
      in_turn(threads, wave.first_row, wave.end_row, [this] { return Reader(*this); });
    }
  }

 private:
  static const std::vector<int32_t>& of_sequence(
      const std::vector<std::vector<int32_t>>& maps, int64_t sequence) {
    return maps[maps.size() == 1 ? 0 : sequence];
  }

  // Threads take items in turn, each with a worker of its own.
  template <typename MakeWorker>
  static void in_turn(int64_t threads, int64_t first, int64_t end, const MakeWorker& make_worker) {
    std::atomic<int64_t> next{first};
    torch::stable::parallel_for(0, std::min(threads, end - first), 1, [&](int64_t, int64_t) {
      auto worker = make_worker();
      for (int64_t i = next++; i < end; i = next++) worker.run(i);
    });
  }

  void set_sequence(DecodePart<Value>& part, int64_t sequence) const {
    part.key.only_page = part.value.only_page = sequence;
    part.key.pages = part.value.pages = call_.pages(sequence);
  }

  // Scores the keys of a part.
  class Scorer {
   public:
    explicit Scorer(Selection& all) : all_(all), call_(all.call_) {
      const int64_t rows = all.plan_.most_rows;
      part_.key = call_.key;
      part_.window_left = call_.window_left;
      part_.scale = call_.scale;
      part_.softcap = call_.softcap;
      part_.query_step = padded(call_.key.dim);
      memory_.reset(new Scratch<Real>({{&part_.packed_queries, rows * part_.query_step},
                                       {&part_.scores, rows * kDecodeBlock},
                                       {&part_.max, padded(rows)},
                                       {&part_.sum, padded(rows)},
                                       {&part_.columns, rows * part_.query_step}}));
      part_.key_heads = &readers_;
      part_.num_key_heads = 1;
      if (call_.key.dim_step != 1) gathered_.resize(kDecodeBlock * call_.key.dim);
      part_.gathered = gathered_.data();
    }

    void run(int64_t index) {
      const auto [g, split] = all_.plan_.parts[index];
      const ScoreGroup& group = all_.plan_.groups[g];
      if (&group != group_) enter(group);
      part_.begin = group.begin + split * group.split_tokens;
      part_.end = std::min(group.end, part_.begin + group.split_tokens);
      part_.all_scores = all_.scores_ + group.first_score + split * group.split_tokens;
      part_.tops = all_.tops_ + group.first_top + split * group.split_tops();
      EA_DISPATCH(score_part<Value>)(part_);
      SoftmaxState<Real>* states = &all_.states_[group.first_state + split * part_.rows];
      for (int64_t r = 0; r < part_.rows; ++r) states[r] = {part_.max[r], part_.sum[r]};
    }

   private:
    void enter(const ScoreGroup& group) {
      group_ = &group;
      all_.set_sequence(part_, group.sequence);
      part_.rows = group.rows();
      part_.tokens = group.tokens;
      part_.newest = group.newest;
      part_.score_step = group.scores();
      part_.top_step = group.tops();
      part_.tops_of_part = group.split_tops();
      part_.top_blocks = group.top_blocks;
      readers_ = {group.key_head, 0, part_.rows};
      queries_.resize(part_.rows);
      for (int64_t r = 0; r < part_.rows; ++r) {
        queries_[r] = call_.query + group.sequence * call_.query_batch_step +
                      group.heads[r / group.tokens] * call_.query_head_step +
                      (group.first_token + r % group.tokens) * call_.query_token_step;
      }
      part_.queries = queries_.data();
    }

    Selection& all_;
    const SelectiveCall<Value>& call_;
    ScorePart<Value> part_{};
    const ScoreGroup* group_ = nullptr;
    std::unique_ptr<Scratch<Real>> memory_;
    std::vector<Value> gathered_;
    std::vector<const Value*> queries_;
    HeadReaders readers_{};
  };

  // Selects values of one query, and reads them.
  class Reader {
   public:
    explicit Reader(const Selection& all) : all_(all), call_(all.call_) {
      row_.value = call_.value;
      row_.rows = 1;
      row_.weighted_step = padded(call_.value.dim);
      memory_.reset(new Scratch<Real>({{&row_.weighted, row_.weighted_step},
                                       {&row_.scores, kDecodeBlock},
                                       {&row_.weights, kDecodeBlock},
                                       {&row_.sum, kDecodePadding},
                                       {&row_.fade, kDecodePadding},
                                       {&scores_, all.plan_.longest + kTops}}));
      candidates_.reset(new Candidate<Real>[all.plan_.longest]);
      if (call_.value.dim_step != 1) gathered_.resize(kDecodeBlock * call_.value.dim);
      row_.gathered = gathered_.data();
    }

    void run(int64_t index) {
      const auto [g, r] = all_.plan_.rows[index];
      const ScoreGroup& group = all_.plan_.groups[g];
      const int64_t head = group.heads[r / group.tokens];
      const int64_t token = group.first_token + r % group.tokens;
      const int64_t at = (group.sequence * call_.heads + head) * call_.tokens + token;
      row_.state = {};
      for (int64_t s = 0; s < group.splits; ++s) {
        row_.state = merge(row_.state, all_.states_[group.first_state + s * group.rows() + r]);
      }
      call_.lse[at] = log_sum_exp(row_.state);
      const int64_t blocks = (group.end - group.begin + kDecodeBlock - 1) / kDecodeBlock;
      const Real* scores = all_.scores_ + group.first_score + r * group.scores();
      row_.count = select(EA_DISPATCH(collect<Real>)(
          scores, blocks * kDecodeBlock, floor(group, r), group.begin, candidates_.get(), scores_));
      row_.selected = candidates_.get();
      row_.value_head = of_sequence(call_.q_to_v, group.sequence)[head];
      row_.out = call_.out + ((group.sequence * call_.tokens + token) * call_.heads + head) *
                                 call_.value.dim;
      row_.kept = call_.kept + at;
      all_.set_sequence(row_, group.sequence);
      EA_DISPATCH(attend_to_selected<Value>)(row_);
    }

   private:
    // What is selected is above this: above it are as many of the largest scores as are selected, and by
    // mass, all that is below may be left out together.
    Real floor(const ScoreGroup& group, int64_t r) const {
      if (!call_.top_values) {
        return row_.state.max + std::log(Real(call_.dropped_mass) / Real(group.end));
      }
      return bound(all_.tops_ + group.first_top + r * group.tops(), group.tops());
    }

    Real bound(const Real* scores, int64_t count) const {
      return EA_DISPATCH(bound_of_best<Real>)(scores, count, call_.top_values, row_.state.max);
    }

    // Leaves the best of `count` candidates, in their order, and says how many.
    int64_t select(int64_t count) {
      return call_.top_values ? select_by_number(count) : select_by_mass(count);
    }

    int64_t select_by_number(int64_t count) {
      if (count <= call_.top_values) return count;
      const Real below = bound(scores_, (count + kTops - 1) / kTops * kTops);
      // What is above the bound and not above the next number is equal, and its first are taken.
      const Real next = std::nextafter(below, Real(INFINITY));
      int64_t equal = call_.top_values -
                      std::count_if(scores_, scores_ + count, [&](Real x) { return x > next; });
      return keep_if(count, [&](const Candidate<Real>& each) {
        return each.score > next || (each.score > below && equal-- > 0);
      });
    }

    int64_t select_by_mass(int64_t count) {
      const auto mass = [this](const Candidate<Real>* first, const Candidate<Real>* last) {
        double sum = 0;
        for (; first < last; ++first) sum += std::exp(first->score - row_.state.max);
        return sum / row_.state.sum;
      };
      ranked_.assign(candidates_.get(), candidates_.get() + count);
      const int64_t wanted =
          select_best(ranked_.data(), count, 1 - call_.dropped_mass, mass);
      if (wanted == count) return count;
      const auto worst = std::max_element(ranked_.begin(), ranked_.begin() + wanted,
                                          [](const auto& a, const auto& b) { return is_better(a, b); });
      return keep_if(count, [&](const auto& each) { return !is_better(*worst, each); });
    }

    template <typename Keep>
    int64_t keep_if(int64_t count, const Keep& keep) {
      Candidate<Real>* kept = candidates_.get();
      for (int64_t i = 0; i < count; ++i) {
        if (keep(candidates_[i])) *kept++ = candidates_[i];
      }
      return kept - candidates_.get();
    }

    const Selection& all_;
    const SelectiveCall<Value>& call_;
    SelectedRow<Value> row_{};
    std::unique_ptr<Scratch<Real>> memory_;
    Real* scores_;  // of the candidates
    std::unique_ptr<Candidate<Real>[]> candidates_;
    std::vector<Candidate<Real>> ranked_;
    std::vector<Value> gathered_;
  };

  const SelectiveCall<Value>& call_;
  ScorePlan plan_;
  std::vector<SoftmaxState<Real>> states_;  // of each row of each part
  std::unique_ptr<Scratch<Real>> memory_;
  Real *scores_, *tops_;  // of the wave
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
