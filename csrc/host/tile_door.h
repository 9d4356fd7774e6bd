#pragma once

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "host/decode_door.h"

namespace ea::host {

// One tile of gathered attention on one instruction set: every query against the keys whose numbers are
// `tokens`, each with a log weight, and a place below which the limit of a row has to lie for the row to
// see it. A row does not see ranks in [hidden_from, hidden_to) either.
struct TileCase {
  Rows queries, keys, values;
  std::vector<int32_t> tokens, places, limits, ranks, hidden_from, hidden_to;
  std::vector<float> log_weights;
  float scale;
};

// (outs, lses).
std::pair<Rows, std::vector<float>> attend_tile(cpu::Isa isa, const TileCase& tile);

// The gradients of queries, and of the keys and values of each column.
std::vector<Rows> differentiate_tile(
    cpu::Isa isa, const TileCase& tile, const Rows& grad_outs, const std::vector<float>& lses,
    const std::vector<float>& deltas);

}  // namespace ea::host
