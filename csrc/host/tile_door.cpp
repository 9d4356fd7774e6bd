#include "host/tile_door.h"

#include <cmath>
#include <stdexcept>

#include "cpu/scratch.h"
#include "cpu/tile.h"

#define EA_BODY "cpu/tile_passes.inl"
#include "cpu/for_each_isa.h"

namespace ea::host {
namespace {

using cpu::kTileBlock;
using cpu::padded_width;

std::vector<float> flat(const Rows& rows) {
  std::vector<float> values;
  for (const auto& row : rows) {
    if (row.size() != rows[0].size()) throw std::invalid_argument("rows differ in length.");
    values.insert(values.end(), row.begin(), row.end());
  }
  return values;
}

Rows rows_of(const float* values, size_t count, size_t dim, size_t step) {
  Rows rows;
  for (size_t r = 0; r < count; ++r) rows.emplace_back(values + r * step, values + r * step + dim);
  return rows;
}

// The memory behind a tile. What is scratch holds NaN, so that it is seen when it is read too early.
class Memory {
 public:
  explicit Memory(const TileCase& given)
      : given_(given), queries_(flat(given.queries)), keys_(flat(given.keys)),
        values_(flat(given.values)), limits_(given.limits), hidden_from_(given.hidden_from),
        hidden_to_(given.hidden_to) {
    for (auto* by_row : {&limits_, &hidden_from_, &hidden_to_}) {
      by_row->resize(cpu::whole_blocks(given.queries.size()));
    }
    for (size_t r = 0; r < given.queries.size(); ++r) {
      rows_.push_back(queries_.data() + r * given.queries[0].size());
    }
  }

  void fill(cpu::Tile<float>& tile) {
    tile.rows = given_.queries.size();
    tile.columns = given_.tokens.size();
    tile.dim = given_.keys.at(0).size();
    tile.value_dim = given_.values.at(0).size();
    tile.scale = given_.scale;
    tile.queries = rows_.data();
    tile.key = keys_.data();
    tile.value = values_.data();
    tile.key_step = tile.dim;
    tile.value_step = tile.value_dim;
    tile.tokens = given_.tokens.data();
    tile.log_weights = given_.log_weights.empty() ? nullptr : given_.log_weights.data();
    tile.place = given_.places.empty() ? nullptr : given_.places.data();
    tile.limit = limits_.data();
    tile.rank = given_.ranks.empty() ? nullptr : given_.ranks.data();
    tile.hidden_from = hidden_from_.data();
    tile.hidden_to = hidden_to_.data();
    tile.queries_by_dim = scratch(cpu::whole_blocks(tile.rows) * tile.dim);
    tile.keys = scratch(kTileBlock * padded_width(tile.dim));
    tile.values = scratch(kTileBlock * padded_width(tile.value_dim));
    tile.scores = scratch(kTileBlock * kTileBlock);
  }

  float* scratch(int64_t size) {
    scratch_.emplace_back(size, NAN);
    return scratch_.back().data();
  }

 private:
  const TileCase& given_;
  std::vector<float> queries_, keys_, values_;
  std::vector<int32_t> limits_, hidden_from_, hidden_to_;
  std::vector<const float*> rows_;
  std::vector<std::vector<float>> scratch_;
};

}  // namespace

std::pair<Rows, std::vector<float>> attend_tile(cpu::Isa isa, const TileCase& given) {
  Memory memory(given);
  cpu::AttendTile<float> tile{};
  memory.fill(tile);
  const int64_t blocks = cpu::whole_blocks(tile.rows);
  tile.weighted = memory.scratch(blocks * padded_width(tile.value_dim));
  for (float** state : {&tile.max, &tile.sum, &tile.fade}) *state = memory.scratch(blocks);
  float* out = memory.scratch(tile.rows * tile.value_dim);
  std::vector<float> lses(tile.rows, NAN);
  std::vector<float*> outs, lse_at;
  for (int64_t r = 0; r < tile.rows; ++r) {
    outs.push_back(out + r * tile.value_dim);
    lse_at.push_back(&lses[r]);
  }
  tile.outs = outs.data();
  tile.lses = lse_at.data();
  EA_SELECT(isa, attend_tile<float>)(tile);
  return {rows_of(out, tile.rows, tile.value_dim, tile.value_dim), lses};
}

std::vector<Rows> differentiate_tile(
    cpu::Isa isa, const TileCase& given, const Rows& grad_outs, const std::vector<float>& lses,
    const std::vector<float>& deltas) {
  Memory memory(given);
  cpu::DifferentiateTile<float> tile{};
  memory.fill(tile);
  const int64_t blocks = cpu::whole_blocks(tile.rows);
  const int64_t key_width = padded_width(tile.dim), value_width = padded_width(tile.value_dim);
  tile.grad_outs_by_dim = memory.scratch(blocks * tile.value_dim);
  tile.query_rows = memory.scratch(blocks * key_width);
  tile.grad_query_rows = memory.scratch(blocks * key_width);
  tile.grad_out_rows = memory.scratch(blocks * value_width);
  tile.grad_scores = memory.scratch(kTileBlock * kTileBlock);
  tile.grad_keys = memory.scratch(tile.columns * key_width);
  tile.grad_values = memory.scratch(tile.columns * value_width);
  std::vector<float> grad_out = flat(grad_outs), grad_query(tile.rows * tile.dim), lse = lses,
                     delta = deltas;
  lse.resize(blocks);
  delta.resize(blocks);
  std::vector<const float*> grad_out_at;
  std::vector<float*> grad_query_at;
  for (int64_t r = 0; r < tile.rows; ++r) {
    grad_out_at.push_back(grad_out.data() + r * tile.value_dim);
    grad_query_at.push_back(grad_query.data() + r * tile.dim);
  }
  tile.grad_outs = grad_out_at.data();
  tile.grad_queries = grad_query_at.data();
  tile.lses = lse.data();
  tile.deltas = delta.data();
  EA_SELECT(isa, differentiate_tile<float>)(tile);
  return {rows_of(grad_query.data(), tile.rows, tile.dim, tile.dim),
          rows_of(tile.grad_keys, tile.columns, tile.dim, key_width),
          rows_of(tile.grad_values, tile.columns, tile.value_dim, value_width)};
}

}  // namespace ea::host
