#pragma once

#include <cstdint>

#include "common/macros.h"

// Counting who has arrived, in a word that nobody has set to zero. The upper bits name the call whose
// arrivals are counted: whatever memory held before counts as none. So a word can be fresh memory of
// every call, which no other stream or graph shares, without a launch that clears it. The last to arrive
// leaves zero, which names no call, and a replayed graph begins anew.

namespace ea {

constexpr int kArrivalBits = 16;
constexpr uint64_t kMostCalls = uint64_t(1) << (64 - kArrivalBits);

struct Arrival {
  uint64_t word;  // what the ticket is afterwards
  bool is_last;   // of `expected` arrivals of the call
};

EA_HOST_DEVICE Arrival arrive(uint64_t word, uint64_t call, int expected) {
  const bool begun = word >> kArrivalBits == call;
  const uint64_t next = begun ? word + 1 : (call << kArrivalBits) + 1;
  const bool is_last = next == (call << kArrivalBits) + uint64_t(expected);
  return {is_last ? 0 : next, is_last};
}

}  // namespace ea
