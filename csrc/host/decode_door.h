#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"

namespace ea::host {

using Rows = std::vector<std::vector<float>>;

// One part of attention to a cache on one instruction set, all in one dtype ("float32", "bfloat16"
// or "float16"): as many queries of one key and value head as there are, of which each `tokens`
// are of one query head, against all keys. Returns (outs, lses).
std::pair<Rows, std::vector<float>> decode_part(
    cpu::Isa isa, const std::string& dtype, const Rows& queries, const Rows& keys,
    const Rows& values, int64_t tokens, int64_t window_left, float scale, float softcap);

// exp (of nothing positive) or tanh of every value.
std::vector<float> exp_of(cpu::Isa isa, std::vector<float> values);
std::vector<float> tanh_of(cpu::Isa isa, std::vector<float> values);

}  // namespace ea::host
