// Attention of a tile, block by block of keys. Included by tile_passes.inl.

// Scores become weights relative to the greatest score so far of their row; `fade` is what has to
// multiply the earlier ones.
template <typename Value>
void soften(const AttendTile<Value>& tile, int64_t count, int64_t first_row, int64_t width) {
  using Real = RealOf<Value>;
  using Vec = VectorFor<Real>;
  const Vec nothing = Vec{} - Real(INFINITY);
  for (int64_t v = 0; v < width; v += lanes<Real>) {
    Real* scores = tile.scores + v;
    const Vec before = load(tile.max + first_row + v);
    Vec top[4] = {before, before, before, before};
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) {
      for (int i = 0; i < 4; ++i) {
        const Vec score = load(scores + (t + i) * kTileBlock);
        top[i] = score > top[i] ? score : top[i];
      }
    }
    for (; t < count; ++t) {
      const Vec score = load(scores + t * kTileBlock);
      top[0] = score > top[0] ? score : top[0];
    }
    for (int i = 1; i < 4; ++i) top[0] = top[i] > top[0] ? top[i] : top[0];
    // While nothing has been seen, any finite number in the place of the maximum gives zeros.
    const Vec shift = top[0] == nothing ? Vec{} : top[0];
    const Vec fade = exp_nonpositive(before - shift);
    Vec sum = {};
    for (t = 0; t < count; ++t) {
      const Vec weight = exp_nonpositive(load(scores + t * kTileBlock) - shift);
      store(scores + t * kTileBlock, weight);
      sum += weight;
    }
    store(tile.max + first_row + v, top[0]);
    store(tile.fade + first_row + v, fade);
    store(tile.sum + first_row + v, load(tile.sum + first_row + v) * fade + sum);
  }
}

// What a row has come to, written or merged into what is there.
template <typename Value>
void finish_row(const AttendTile<Value>& tile, int64_t row) {
  using Real = RealOf<Value>;
  const SoftmaxState<Real> state{tile.max[row], tile.sum[row]};
  const Real lse = log_sum_exp(state), before = tile.merges ? *tile.lses[row] : Real(-INFINITY);
  const Real* weighted = tile.weighted + row * padded_width(tile.value_dim);
  Real* out = tile.outs[row];
  if (lse == Real(-INFINITY) && tile.merges) return;
  const SoftmaxState<Real> both = merge(SoftmaxState<Real>{before, Real(before != Real(-INFINITY))}, state);
  const Real keep = both.sum == 0 ? Real(0) : shifted_exp(before, both.max) / both.sum;
  const Real add = both.sum == 0 ? Real(0) : shifted_exp(state.max, both.max) / both.sum;
  for (int64_t d = 0; d < tile.value_dim; ++d) {
    out[d] = (keep == 0 ? Real(0) : keep * out[d]) + add * weighted[d];
  }
  *tile.lses[row] = log_sum_exp(both);
}

template <typename Value>
void attend_tile(const AttendTile<Value>& tile) {
  using Real = RealOf<Value>;
  const int64_t value_width = padded_width(tile.value_dim);
  const int64_t whole = whole_blocks(tile.rows);
  fetch_keys<Value>(tile, 0, kTileBlock);
  for (int64_t row = 0; row < tile.rows; row += kTileBlock) {
    copy_across(tile.queries + row, tile.rows - row, tile.dim, tile.scale,
                tile.queries_by_dim + row * tile.dim);
  }
  for (int64_t r = 0; r < whole; ++r) {
    tile.max[r] = Real(-INFINITY);
    tile.sum[r] = 0;
  }
  for (int64_t i = 0; i < tile.rows * value_width; ++i) tile.weighted[i] = 0;
  for (int64_t begin = 0; begin < tile.columns; begin += kTileBlock) {
    const KeyBlock<Value> block = gather_block<Value>(tile, begin);
    for (int64_t row = 0; row < tile.rows; row += kTileBlock) {
      const Sight seen = sight<Value>(tile, block, row);
      if (seen == Sight::none) continue;
      const int64_t ahead = begin + kTileBlock, share = kTileBlock * kTileBlock / whole;
      fetch_keys<Value>(tile, ahead + row / kTileBlock * share, ahead + (row / kTileBlock + 1) * share);
      const int64_t rows = tile.rows - row < kTileBlock ? tile.rows - row : kTileBlock;
      const int64_t width = whole_vectors<Real>(rows);
      score_block<Value>(tile, block, row, width, seen);
      soften(tile, block.count, row, width);
      multiply<Real>({tile.scores, 1, kTileBlock, tile.values, value_width,
                      tile.weighted + row * value_width, value_width, block.count, true,
                      tile.fade + row},
                     rows, tile.value_dim);
    }
  }
  for (int64_t r = 0; r < tile.rows; ++r) finish_row(tile, r);
}
