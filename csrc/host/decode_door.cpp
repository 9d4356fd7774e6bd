#include "host/decode_door.h"

#include <numeric>
#include <stdexcept>

#include "cpu/decode.h"
#include "cpu/merge_states.h"

#define EA_BODY "host/probes.inl"
#include "cpu/for_each_isa.h"

namespace ea::host {
namespace {

template <typename Value>
std::vector<Value> flat(const Rows& rows, size_t dim) {
  std::vector<float> values;
  for (const auto& row : rows) {
    if (row.size() != dim) throw std::invalid_argument("rows differ in length.");
    values.insert(values.end(), row.begin(), row.end());
  }
  std::vector<Value> converted(values.size());
  cpu::baseline::convert(values.data(), converted.data(), int64_t(values.size()));
  return converted;
}

template <typename Value>
std::pair<Rows, std::vector<float>> run(
    cpu::Isa isa, const Rows& queries, const Rows& keys, const Rows& values,
    cpu::DecodePart<Value> part) {
  const int64_t rows = queries.size(), count = keys.size();
  const int64_t dim = keys.at(0).size(), value_dim = values.at(0).size();
  const auto query = flat<Value>(queries, dim), key = flat<Value>(keys, dim),
             value = flat<Value>(values, value_dim);
  part.key = {key.data(), 0, 0, dim, 1, dim, count, {}, 0};
  part.value = {value.data(), 0, 0, value_dim, 1, value_dim, count, {}, 0};
  const cpu::HeadReaders readers{0, 0, rows};
  part.key_heads = part.value_heads = &readers;
  part.num_key_heads = part.num_value_heads = 1;
  std::vector<int32_t> value_rows(rows);
  std::iota(value_rows.begin(), value_rows.end(), 0);
  part.value_rows = value_rows.data();
  part.rows = rows;
  part.end = count;
  part.newest = count - part.tokens;

  std::vector<const Value*> query_at;
  std::vector<float> lses(rows), outs(rows * value_dim);
  std::vector<float*> lse_at;
  for (int64_t r = 0; r < rows; ++r) {
    query_at.push_back(query.data() + r * dim);
    lse_at.push_back(&lses[r]);
  }
  part.queries = query_at.data();
  part.lses = lse_at.data();
  part.partial = outs.data();

  part.query_step = cpu::padded(dim);
  part.weighted_step = cpu::padded(value_dim);
  std::vector<float> scratch[8];
  float** const places[] = {&part.packed_queries, &part.scores, &part.weights, &part.weighted,
                            &part.max,            &part.sum,    &part.fade,    &part.columns};
  const int64_t widths[] = {part.query_step, cpu::kDecodeBlock, cpu::kDecodeBlock,
                            part.weighted_step, 1, 1, 1, part.query_step};
  for (int i = 0; i < 8; ++i) {
    scratch[i].assign(rows * widths[i], NAN);
    *places[i] = scratch[i].data();
  }
  EA_SELECT(isa, decode_part<Value>)(part);

  Rows out;
  for (int64_t r = 0; r < rows; ++r) {
    out.emplace_back(outs.begin() + r * value_dim, outs.begin() + (r + 1) * value_dim);
  }
  return {out, lses};
}

template <typename Value>
cpu::DecodePart<Value> options(int64_t tokens, int64_t window_left, float scale, float softcap) {
  cpu::DecodePart<Value> part{};
  part.tokens = tokens;
  part.window_left = window_left;
  part.scale = scale;
  part.softcap = softcap;
  return part;
}

}  // namespace

std::pair<Rows, std::vector<float>> decode_part(
    cpu::Isa isa, const std::string& dtype, const Rows& queries, const Rows& keys,
    const Rows& values, int64_t tokens, int64_t window_left, float scale, float softcap) {
  if (queries.empty() || keys.empty() || keys.size() != values.size()) {
    throw std::invalid_argument("pass queries, and as many keys as values.");
  }
  const auto call = [&](auto zero) {
    using Value = decltype(zero);
    return run<Value>(isa, queries, keys, values,
                      options<Value>(tokens, window_left, scale, softcap));
  };
  if (dtype == "float32") return call(float{});
  if (dtype == "bfloat16") return call(cpu::BFloat16{});
  if (dtype == "float16") return call(cpu::Half{});
  throw std::invalid_argument("dtype is " + dtype + "; pass float32, bfloat16 or float16.");
}

std::vector<float> exp_of(cpu::Isa isa, std::vector<float> values) {
  const size_t count = values.size();
  values.resize((count + 15) / 16 * 16);
  EA_SELECT(isa, exp_of_all)(values.data(), int64_t(values.size()));
  values.resize(count);
  return values;
}

std::vector<float> tanh_of(cpu::Isa isa, std::vector<float> values) {
  const size_t count = values.size();
  values.resize((count + 15) / 16 * 16);
  EA_SELECT(isa, tanh_of_all)(values.data(), int64_t(values.size()));
  values.resize(count);
  return values;
}

}  // namespace ea::host
