// Queries and gathered keys of one head, as they are multiplied, and which see which. Included by
// tile_passes.inl.
//
// Queries lie across the lanes of a vector, so that keys are read where they are, row by row, and a
// softmax takes no sums over lanes.

#include "cpu/products.inl"

template <typename Real>
EA_HOST_DEVICE int64_t whole_vectors(int64_t size) {
  return (size + lanes<Real> - 1) / lanes<Real> * lanes<Real>;
}

// A row of memory as numbers to compute with, followed by zeros up to a whole vector.
template <typename Value>
EA_HOST_DEVICE void copy_row(const Value* row, int64_t dim, RealOf<Value>* copy) {
  constexpr int step = lanes<RealOf<Value>>;
  int64_t d = 0;
  for (; d + step <= dim; d += step) store(copy + d, load(row + d));
  if (d < dim) store(copy + d, load_some(row + d, dim - d));
}

// Rows side by side: copy[d * kTileBlock + r] = factor * rows[r][d], zero for missing rows.
template <typename Value>
void copy_across(
    const Value* const* rows, int64_t count, int64_t dim, RealOf<Value> factor,
    RealOf<Value>* copy) {
  using Real = RealOf<Value>;
  using Vec = VectorFor<Real>;
  constexpr int step = lanes<Real>;
  for (int64_t d = 0; d < dim; d += step) {
    const int64_t some = dim - d < step ? dim - d : step;
    for (int64_t first = 0; first < kTileBlock; first += step) {
      Real square[step][step];
      for (int r = 0; r < step; ++r) {
        const bool exists = first + r < count;
        Vec row = {};
        if (exists) row = some == step ? load(rows[first + r] + d) : load_some(rows[first + r] + d, some);
        store(square[r], row * factor);
      }
      for (int64_t i = 0; i < some; ++i) {
        Vec column;
        for (int r = 0; r < step; ++r) column[r] = square[r][i];
        store(copy + (d + i) * kTileBlock + first, column);
      }
    }
  }
}

// The keys of a tile from `begin` on, `count` of them.
template <typename Value>
struct KeyBlock {
  int64_t begin, count;
  IntegerOf<RealOf<Value>> first_place, last_place;  // the least and the greatest
  bool ranked;                                       // whether some row may hide one of them
};

template <typename Value>
EA_HOST_DEVICE KeyBlock<Value> gather_block(const Tile<Value>& tile, int64_t begin) {
  const int64_t left = tile.columns - begin, count = left < kTileBlock ? left : kTileBlock;
  KeyBlock<Value> block{begin, count, 0, 0, false};
  const int64_t key_width = padded_width(tile.dim), value_width = padded_width(tile.value_dim);
  for (int64_t t = 0; t < count; ++t) {
    copy_row(tile.key + tile.tokens[begin + t] * tile.key_step, tile.dim, tile.keys + t * key_width);
    copy_row(tile.value + tile.tokens[begin + t] * tile.value_step, tile.value_dim,
             tile.values + t * value_width);
  }
  if (tile.place) {
    block.first_place = block.last_place = tile.place[begin];
    for (int64_t t = 1; t < count; ++t) {
      const auto place = tile.place[begin + t];
      block.first_place = place < block.first_place ? place : block.first_place;
      block.last_place = place > block.last_place ? place : block.last_place;
    }
  }
  if (tile.rank) {
    for (int64_t t = 0; t < count; ++t) block.ranked |= tile.rank[begin + t] >= 0;
  }
  return block;
}

// Asks for the rows of the keys [begin, end), so that they are near when they are copied.
template <typename Value>
EA_HOST_DEVICE void fetch_keys(const Tile<Value>& tile, int64_t begin, int64_t end) {
  constexpr int64_t line = 64 / sizeof(Value);
  for (int64_t t = begin; t < end && t < tile.columns; ++t) {
    const Value* key = tile.key + tile.tokens[t] * tile.key_step;
    const Value* value = tile.value + tile.tokens[t] * tile.value_step;
    for (int64_t d = 0; d < tile.dim; d += line) __builtin_prefetch(key + d, 0, 2);
    for (int64_t d = 0; d < tile.value_dim; d += line) __builtin_prefetch(value + d, 0, 2);
  }
}

// Which columns of a block of keys the rows of a block see.
enum class Sight { none, some, all };

template <typename Value>
EA_HOST_DEVICE Sight sight(const Tile<Value>& tile, const KeyBlock<Value>& block, int64_t first_row) {
  if (!tile.place) return block.ranked ? Sight::some : Sight::all;
  const int64_t left = tile.rows - first_row, count = left < kTileBlock ? left : kTileBlock;
  auto least = tile.limit[first_row], most = least;
  for (int64_t r = 1; r < count; ++r) {
    const auto limit = tile.limit[first_row + r];
    least = limit < least ? limit : least;
    most = limit > most ? limit : most;
  }
  if (block.first_place >= most) return Sight::none;
  return block.last_place >= least || block.ranked ? Sight::some : Sight::all;
}

// Adds log weights to the scores of a block, and makes those -inf that a row does not see.
template <typename Value>
void mask_scores(
    const Tile<Value>& tile, const KeyBlock<Value>& block, int64_t first_row, int64_t width,
    bool masked) {
  using Real = RealOf<Value>;
  using Vec = VectorFor<Real>;
  using Integers = decltype(Vec{} < Vec{});
  const Vec nothing = Vec{} - Real(INFINITY);
  for (int64_t v = 0; v < width; v += lanes<Real>) {
    Integers limit{}, from{}, to{};
    if (tile.place) std::memcpy(&limit, tile.limit + first_row + v, sizeof(limit));
    if (block.ranked) {
      std::memcpy(&from, tile.hidden_from + first_row + v, sizeof(from));
      std::memcpy(&to, tile.hidden_to + first_row + v, sizeof(to));
    }
    for (int64_t t = 0; t < block.count; ++t) {
      Real* at = tile.scores + t * kTileBlock + v;
      Vec score = load(at);
      if (tile.log_weights) score += tile.log_weights[block.begin + t];
      if (masked && tile.place) {
        const Integers place = Integers{} + tile.place[block.begin + t];
        score = place < limit ? score : nothing;
      }
      if (masked && block.ranked) {
        const Integers rank = Integers{} + tile.rank[block.begin + t];
        score = ((rank >= from) & (rank < to)) ? nothing : score;
      }
      store(at, score);
    }
  }
}

// The scores of a block of keys, by key, for the rows of a block.
template <typename Value>
EA_HOST_DEVICE void score_block(
    const Tile<Value>& tile, const KeyBlock<Value>& block, int64_t first_row, int64_t width,
    Sight seen) {
  using Real = RealOf<Value>;
  multiply<Real>({tile.keys, padded_width(tile.dim), 1, tile.queries_by_dim + first_row * tile.dim,
                  kTileBlock, tile.scores, kTileBlock, tile.dim, false, nullptr},
                 block.count, width);
  if (tile.log_weights || seen == Sight::some) {
    mask_scores(tile, block, first_row, width, seen == Sight::some);
  }
}
