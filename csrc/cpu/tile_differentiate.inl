// The gradient of attention of a tile, block by block of keys. Included by tile_passes.inl.

// Scores become weights P, and gradients of weights become those of scores, P (dP - delta).
template <typename Value>
void differentiate_softmax(
    const DifferentiateTile<Value>& tile, int64_t count, int64_t first_row, int64_t width) {
  using Real = RealOf<Value>;
  using Vec = VectorFor<Real>;
  const Vec nothing = Vec{} - Real(INFINITY);
  for (int64_t v = 0; v < width; v += lanes<Real>) {
    const Vec lse = load(tile.lses + first_row + v), delta = load(tile.deltas + first_row + v);
    const Vec shift = lse == nothing ? Vec{} : lse;
    for (int64_t t = 0; t < count; ++t) {
      Real *score = tile.scores + t * kTileBlock + v, *grad = tile.grad_scores + t * kTileBlock + v;
      const Vec weight = exp_nonpositive(load(score) - shift);
      store(score, weight);
      store(grad, weight * (load(grad) - delta));
    }
  }
}

template <typename Value>
void differentiate_tile(const DifferentiateTile<Value>& tile) {
  using Real = RealOf<Value>;
  const int64_t key_width = padded_width(tile.dim), value_width = padded_width(tile.value_dim);
  const int64_t whole = whole_blocks(tile.rows);
  fetch_keys<Value>(tile, 0, kTileBlock);
  for (int64_t row = 0; row < tile.rows; row += kTileBlock) {
    copy_across(tile.queries + row, tile.rows - row, tile.dim, tile.scale,
                tile.queries_by_dim + row * tile.dim);
    copy_across(tile.grad_outs + row, tile.rows - row, tile.value_dim, Real(1),
                tile.grad_outs_by_dim + row * tile.value_dim);
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    copy_row(tile.queries[r], tile.dim, tile.query_rows + r * key_width);
    copy_row(tile.grad_outs[r], tile.value_dim, tile.grad_out_rows + r * value_width);
  }
  for (int64_t i = 0; i < tile.rows * key_width; ++i) {
    tile.query_rows[i] *= tile.scale;
    tile.grad_query_rows[i] = 0;
  }
  for (int64_t begin = 0; begin < tile.columns; begin += kTileBlock) {
    const KeyBlock<Value> block = gather_block<Value>(tile, begin);
    Real* grad_keys = tile.grad_keys + begin * key_width;
    Real* grad_values = tile.grad_values + begin * value_width;
    bool adds = false;
    for (int64_t row = 0; row < tile.rows; row += kTileBlock) {
      const Sight seen = sight<Value>(tile, block, row);
      if (seen == Sight::none) continue;
      const int64_t ahead = begin + kTileBlock, share = kTileBlock * kTileBlock / whole;
      fetch_keys<Value>(tile, ahead + row / kTileBlock * share, ahead + (row / kTileBlock + 1) * share);
      const int64_t rows = tile.rows - row < kTileBlock ? tile.rows - row : kTileBlock;
      const int64_t width = whole_vectors<Real>(rows);
      score_block<Value>(tile, block, row, width, seen);
      multiply<Real>({tile.values, value_width, 1, tile.grad_outs_by_dim + row * tile.value_dim,
                      kTileBlock, tile.grad_scores, kTileBlock, tile.value_dim, false, nullptr},
                     block.count, width);
      differentiate_softmax(tile, block.count, row, width);
      multiply<Real>({tile.scores, kTileBlock, 1, tile.grad_out_rows + row * value_width,
                      value_width, grad_values, value_width, rows, adds, nullptr},
                     block.count, tile.value_dim);
      multiply<Real>({tile.grad_scores, kTileBlock, 1, tile.query_rows + row * key_width, key_width,
                      grad_keys, key_width, rows, adds, nullptr},
                     block.count, tile.dim);
      multiply<Real>({tile.grad_scores, 1, kTileBlock, tile.keys, key_width,
                      tile.grad_query_rows + row * key_width, key_width, block.count, true,
                      nullptr},
                     rows, tile.dim);
      adds = true;
    }
    if (adds) continue;
    for (int64_t i = 0; i < block.count * key_width; ++i) grad_keys[i] = 0;
    for (int64_t i = 0; i < block.count * value_width; ++i) grad_values[i] = 0;
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const Real* from = tile.grad_query_rows + r * key_width;
    for (int64_t d = 0; d < tile.dim; ++d) tile.grad_queries[r][d] += tile.scale * from[d];
  }
}
