#include "cuda/machine.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace ea::cuda::emulated {
namespace {

constexpr size_t kStackBytes = 128 << 10;
// Where a copy is under way there is NaN, in every type of two bytes.
constexpr int kPoison = 0xff;

struct Copy {
  Granule* to;
  const void* from;
  bool inside;
};

// Where threads wait until as many have come as there are.
struct Meeting {
  int expected = 0, arrived = 0;
  uint64_t round = 0;
  const char* what = nullptr;

  // Whether this thread is the last of its round.
  bool arrive(const char* purpose) {
    if (arrived > 0 && std::strcmp(what, purpose) != 0) {
      throw std::runtime_error(std::string("threads that meet do different things: ") + what +
                               " and " + purpose);
    }
    what = purpose;
    if (++arrived < expected) return false;
    arrived = 0;
    ++round;
    return true;
  }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
  const Meeting* waits_for = nullptr;
  uint64_t round = 0;
  std::vector<std::vector<Copy>> groups;  // copies of each commit, the last not yet committed

  bool can_run() const { return !done && (!waits_for || waits_for->round != round); }
};

struct Warp {
  Meeting meeting;
  const void* ins[32];
  void* outs[32];
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting meeting;
  std::vector<Granule> shared;
  const std::function<void(int, char*)>* program;
  int index = 0, running = 0;
  ucontext_t scheduler;
  std::exception_ptr error;
  std::mt19937_64 order;

  Thread& me() { return threads[running]; }

  void wait_for(const Meeting& meeting, uint64_t round) {
    me().waits_for = &meeting;
    me().round = round;
    swapcontext(&me().context, &scheduler);
  }

  void run(int block);
};

thread_local Block* block_of_thread = nullptr;

void enter() {
  Block& block = *block_of_thread;
  Thread& thread = block.me();
  try {
    (*block.program)(block.index, reinterpret_cast<char*>(block.shared.data()));
    // A block that ends with copies under way would write into memory of the next one.
    for (const auto& group : thread.groups) {
      if (!group.empty()) throw std::runtime_error("a thread ended before its copies.");
    }
  } catch (...) {
    block.error = std::current_exception();
  }
  thread.done = true;
  swapcontext(&thread.context, &block.scheduler);
}

void Block::run(int block) {
  index = block;
  std::fill(shared.begin(), shared.end(), Granule{{~0u, ~0u, ~0u, ~0u}});
  std::vector<int> queue(threads.size());
  std::iota(queue.begin(), queue.end(), 0);
  for (const int t : queue) {
    Thread& thread = threads[t];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, enter, 0);
    thread.done = false;
    thread.waits_for = nullptr;
    thread.groups.assign(1, {});
  }
  std::shuffle(queue.begin(), queue.end(), order);
  for (size_t left = threads.size(); left > 0;) {
    bool moved = false;
    for (const int t : queue) {
      if (!threads[t].can_run()) continue;
      moved = true;
      running = t;
      threads[t].waits_for = nullptr;
      swapcontext(&scheduler, &threads[t].context);
      if (error) std::rethrow_exception(error);
      left -= threads[t].done;
    }
    if (!moved && left > 0) throw std::runtime_error("some threads wait for others that ended.");
  }
}

}  // namespace

void launch(int blocks, int threads, int64_t shared_bytes, uint64_t seed,
            const std::function<void(int block, char* shared)>& program) {
  Block block;
  block.threads = std::vector<Thread>(threads);
  block.warps.resize(threads / 32);
  for (Warp& warp : block.warps) warp.meeting.expected = 32;
  block.meeting.expected = threads;
  block.shared.resize((shared_bytes + 15) / 16);
  block.program = &program;
  block.order.seed(seed);
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), block.order);
  block_of_thread = &block;
  for (const int b : order) block.run(b);
  block_of_thread = nullptr;
}

int current_thread() { return block_of_thread->running; }

void wait_for_block() {
  Block& block = *block_of_thread;
  const uint64_t round = block.meeting.round;
  if (!block.meeting.arrive("sync_block")) block.wait_for(block.meeting, round);
}

void meet(const char* what, const void* in, void* out, Act act) {
  Block& block = *block_of_thread;
  Warp& warp = block.warps[block.running / 32];
  warp.ins[block.running % 32] = in;
  warp.outs[block.running % 32] = out;
  const uint64_t round = warp.meeting.round;
  if (warp.meeting.arrive(what)) {
    act(warp.ins, warp.outs);
  } else {
    block.wait_for(warp.meeting, round);
  }
}

void start_copy(Granule* to, const void* from, bool inside) {
  check_shared(to);
  if (inside && reinterpret_cast<uintptr_t>(from) % sizeof(Granule) != 0) {
    throw std::runtime_error("a granule is copied from an address that is no multiple of 16.");
  }
  std::memset(to, kPoison, sizeof(Granule));
  block_of_thread->me().groups.back().push_back({to, from, inside});
}

void commit() { block_of_thread->me().groups.emplace_back(); }

void wait(int pending) {
  auto& groups = block_of_thread->me().groups;
  // The last group is the one that has not been committed.
  const auto done = std::max<int64_t>(0, int64_t(groups.size()) - 1 - pending);
  for (int64_t g = 0; g < done; ++g) {
    for (const Copy& copy : groups[g]) {
      if (copy.inside) {
        std::memcpy(copy.to, copy.from, sizeof(Granule));
      } else {
        std::memset(copy.to, 0, sizeof(Granule));
      }
    }
  }
  groups.erase(groups.begin(), groups.begin() + done);
}

void check_shared(const Granule* row) {
  const auto& shared = block_of_thread->shared;
  const auto* first = shared.data();
  const bool inside = row >= first && row < first + shared.size();
  if (!inside || reinterpret_cast<uintptr_t>(row) % sizeof(Granule) != 0) {
    throw std::runtime_error("an address lies outside of shared memory, or between granules.");
  }
}

float to_float(uint16_t bits, BFloat16) {
  return torch::headeronly::BFloat16(bits, torch::headeronly::BFloat16::from_bits());
}
float to_float(uint16_t bits, Half) {
  return torch::headeronly::Half(bits, torch::headeronly::Half::from_bits());
}
uint16_t rounded(float value, BFloat16) { return torch::headeronly::BFloat16(value).x; }
uint16_t rounded(float value, Half) { return torch::headeronly::Half(value).x; }

}  // namespace ea::cuda::emulated
