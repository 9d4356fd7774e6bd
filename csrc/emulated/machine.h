#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <type_traits>

#include "common/fragments.h"

// The machine of cuda/machine.h on the host. Every thread of a block is a fiber that runs until it has to
// wait for others; blocks run one after another. What a device leaves undefined shows: threads of a warp
// that do not meet, copies that nobody waited for, addresses outside of shared memory or out of line.

namespace ea::cuda {

namespace emulated {

// Runs `blocks` blocks of `threads` threads: program(block, shared), in an order that `seed` shuffles.
// Throws std::runtime_error for what a device would not forgive.
void launch(int blocks, int threads, int64_t shared_bytes, uint64_t seed,
            const std::function<void(int block, char* shared)>& program);

int current_thread();
void wait_for_block();

// What all lanes of a warp do together: when the last one has come, act(ins, outs) is called once with
// what each has brought and where each wants its result. `what` tells operations apart.
using Act = void (*)(const void* const* ins, void* const* outs);
void meet(const char* what, const void* in, void* out, Act act);

void start_copy(Granule* to, const void* from, bool inside);
void commit();
void wait(int pending);
void check_shared(const Granule* row);

float to_float(uint16_t bits, BFloat16);
float to_float(uint16_t bits, Half);
uint16_t rounded(float value, BFloat16);
uint16_t rounded(float value, Half);

template <typename T>
struct Shuffled {
  T value;
  int source;
};

struct Product {
  float* sum;
  const uint32_t* left;
  uint32_t right[2];
};

// Number `i` of a register that holds two.
template <typename Element>
float half_of(uint32_t word, int i) {
  return to_float(uint16_t(word >> (16 * i)), Element{});
}

template <bool kTransposed>
void exchange_matrices(const void* const* ins, void* const* outs) {
  for (int to = 0; to < 32; ++to) {
    uint32_t* registers = static_cast<uint32_t*>(outs[to]);
    for (int j = 0; j < 4; ++j) {
      uint32_t word = 0;
      for (int i = 0; i < 2; ++i) {
        const int row = kTransposed ? 2 * (to % 4) + i : to / 4;
        const int column = kTransposed ? to / 4 : 2 * (to % 4) + i;
        const auto* numbers = static_cast<const uint16_t*>(ins[8 * j + row]);
        word |= uint32_t(numbers[column]) << (16 * i);
      }
      registers[j] = word;
    }
  }
}

template <typename Element>
void multiply_matrices(const void* const* ins, void* const*) {
  float left[16][16], right[16][8];
  const auto of = [&](int lane) { return static_cast<const Product*>(ins[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < 4; ++r) {
        left[fragments::left_row(lane, r)][fragments::left_column(lane, r) + i] =
            half_of<Element>(of(lane)->left[r], i);
      }
      for (int r = 0; r < 2; ++r) {
        right[fragments::right_row(lane, r) + i][fragments::right_column(lane)] =
            half_of<Element>(of(lane)->right[r], i);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int c = 0; c < 4; ++c) {
      const float* row = left[fragments::product_row(lane, c)];
      const int column = fragments::product_column(lane, c);
      float sum = of(lane)->sum[c];
      for (int k = 0; k < 16; ++k) sum += row[k] * right[k][column];
      of(lane)->sum[c] = sum;
    }
  }
}

}  // namespace emulated

inline int thread() { return emulated::current_thread(); }
inline int lane() { return thread() % 32; }
inline int warp() { return thread() / 32; }

inline void forget(int&) {}

inline void sync_block() { emulated::wait_for_block(); }
inline void sync_warp() {
  emulated::meet("sync_warp", nullptr, nullptr, [](const void* const*, void* const*) {});
}

template <typename T>
T shuffle(T value, int source) {
  const emulated::Shuffled<T> in{value, source};
  T out{};
  emulated::meet("shuffle", &in, &out, [](const void* const* ins, void* const* outs) {
    for (int to = 0; to < 32; ++to) {
      const int from = static_cast<const emulated::Shuffled<T>*>(ins[to])->source % 32;
      *static_cast<T*>(outs[to]) = static_cast<const emulated::Shuffled<T>*>(ins[from])->value;
    }
  });
  return out;
}

inline uint32_t ballot(bool condition) {
  uint32_t votes = 0;
  emulated::meet("ballot", &condition, &votes, [](const void* const* ins, void* const* outs) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= uint32_t(*static_cast<const bool*>(ins[i])) << i;
    for (int i = 0; i < 32; ++i) *static_cast<uint32_t*>(outs[i]) = all;
  });
  return votes;
}

inline float exp2_of(float x) { return std::exp2(x); }

inline void copy_async(Granule* to, const void* from, bool inside) {
  emulated::start_copy(to, from, inside);
}
inline void commit_copies() { emulated::commit(); }
template <int kPending>
void wait_copies() {
  emulated::wait(kPending);
}

inline void load_matrices(uint32_t (&to)[4], const Granule* row) {
  emulated::check_shared(row);
  emulated::meet("load_matrices", row, to, emulated::exchange_matrices<false>);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const Granule* row) {
  emulated::check_shared(row);
  emulated::meet("load_matrices_transposed", row, to, emulated::exchange_matrices<true>);
}

template <typename Element>
void multiply_add(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  const emulated::Product product{sum, left, {right0, right1}};
  emulated::meet("multiply_add", &product, nullptr, emulated::multiply_matrices<Element>);
}

template <typename Element>
uint32_t pack(float first, float second) {
  return emulated::rounded(first, Element{}) |
         uint32_t(emulated::rounded(second, Element{})) << 16;
}

// Blocks run one after another.
inline void fence() {}
template <typename T>
T load_fresh(const T* from) {
  return *from;
}
inline uint64_t swap_if_equal(uint64_t* word, uint64_t expected, uint64_t wanted) {
  const uint64_t found = *word;
  if (found == expected) *word = wanted;
  return found;
}

}  // namespace ea::cuda
