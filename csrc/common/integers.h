#pragma once

#include <cstdint>

#include "common/macros.h"

namespace ea {

// Integers at a constant step, 32 or 64 bits wide.
struct Integers {
  const void* data;
  int64_t step;
  bool wide;

  EA_HOST_DEVICE int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * step]
                : static_cast<const int32_t*>(data)[i * step];
  }
};

}  // namespace ea
