// Attention of a few queries to cached rows. Included by for_each_isa.h, once per instruction set.

#include "cpu/decode_products.inl"
#include "cpu/merge_states.inl"

template <typename Value>
using Packed = typename Dot<Value>::Packed;

// Where the tokens of a block of a cache lie.
template <typename Value>
struct CacheBlock {
  int64_t count;
  int64_t offsets[kDecodeBlock];   // of each token, before that of the head
  int64_t gathered[kDecodeBlock];  // of each token in a copy

  // The block from `begin` on, or what there is of it before `end`, if anything.
  EA_HOST_DEVICE void locate(const CachedRows<Value>& cache, int64_t begin, int64_t end) {
    count = end - begin < kDecodeBlock ? end - begin : kDecodeBlock;
    if (count <= 0) return;
    int64_t block = begin / cache.page_size, row = begin % cache.page_size;
    for (int64_t t = 0; t < count; ++block, row = 0) {
      const int64_t page = cache.pages.data ? cache.pages.at(block) : cache.only_page;
      for (; t < count && row < cache.page_size; ++t, ++row) {
        offsets[t] = page * cache.page_step + row * cache.token_step;
        gathered[t] = t * cache.dim;
      }
    }
  }
};

// The rows of one head in a block: value d of token t is base[offsets[t] + d].
template <typename Value>
struct HeadRows {
  const Value* base;
  const int64_t* offsets;

  EA_HOST_DEVICE HeadRows(
      const CachedRows<Value>& cache, const CacheBlock<Value>& block, int64_t head, Value* copy)
      : base(cache.data + head * cache.head_step), offsets(block.offsets) {
    if (cache.dim_step == 1) return;
    for (int64_t t = 0; t < block.count; ++t) {
      for (int64_t d = 0; d < cache.dim; ++d) {
        copy[t * cache.dim + d] = base[offsets[t] + d * cache.dim_step];
      }
    }
    base = copy;
    offsets = block.gathered;
  }
};

template <typename Value>
EA_HOST_DEVICE RowsAhead<Value> rows_ahead(
    const CachedRows<Value>& cache, const CacheBlock<Value>& block, int64_t head) {
  // Rows that have to be gathered are not worth asking for.
  const int64_t count = cache.dim_step == 1 ? block.count : 0;
  return {cache.data + head * cache.head_step, block.offsets, count, cache.dim};
}

#if EA_BF16_DOT
// How many of `rows` rows are scored across the lanes of vectors: 16 at a time, and maybe 8.
EA_HOST_DEVICE int64_t rows_across(int64_t rows, int64_t dim) { return dim % 4 ? 0 : rows / 8 * 8; }

// Queries in columns, for rows that are scored across.
EA_HOST_DEVICE void pack_columns(const DecodePart<BFloat16>& part) {
  const auto* packed = reinterpret_cast<const BFloat16*>(part.packed_queries);
  auto* columns = reinterpret_cast<BFloat16*>(part.columns);
  for (int64_t k = 0; k < part.num_key_heads; ++k) {
    const HeadReaders& readers = part.key_heads[k];
    const int64_t end = readers.first + rows_across(readers.count, part.key.dim);
    for (int64_t row = readers.first, width; row < end; row += width) {
      width = end - row >= 16 ? 16 : 8;
      const int64_t channels = 32 / width;
      BFloat16* to = columns + row * part.query_step;
      for (int64_t d = 0; d < part.key.dim; d += channels) {
        for (int64_t r = 0; r < width; ++r, to += channels) {
          std::memcpy(to, packed + (row + r) * part.query_step + d, channels * sizeof(*to));
        }
      }
    }
  }
}
#endif

template <typename Value>
void pack_queries(const DecodePart<Value>& part) {
  auto* packed = reinterpret_cast<Packed<Value>*>(part.packed_queries);
  for (int64_t r = 0; r < part.rows; ++r, packed += part.query_step) {
    const int64_t dim = part.key.dim;
    std::memset(packed + dim, 0, (part.query_step - dim) * sizeof(*packed));
    if constexpr (std::is_same_v<Packed<Value>, Value>) {
      std::memcpy(packed, part.queries[r], dim * sizeof(*packed));
    } else {
      int64_t d = 0;
      for (; d + lanes<float> <= dim; d += lanes<float>) {
        store(packed + d, load(part.queries[r] + d));
      }
      if (d < dim) store(packed + d, load_some(part.queries[r] + d, dim - d));
    }
  }
#if EA_BF16_DOT
  if constexpr (Dot<Value>::interleaves) pack_columns(part);
#endif
}

// Scores of the rows from `first` on, with four tokens from `t` on.
template <int kRows, typename Value>
EA_HOST_DEVICE void score_rows(
    const DecodePart<Value>& part, const Value* const (&keys)[4], int64_t first, int64_t t) {
  const auto* queries = reinterpret_cast<const Packed<Value>*>(part.packed_queries);
  score_tile<kRows, Value>(queries + first * part.query_step, part.query_step, keys, part.key.dim,
                           part.scores + first * kDecodeBlock + t, kDecodeBlock);
}

// The scores of one row become weights relative to the largest score so far, and `fade` is what
// has to multiply the earlier ones. Only the tokens [from, to) of the block are seen.
template <typename Value>
void soften_row(const DecodePart<Value>& part, int64_t row, int64_t from, int64_t to) {
  using Real = RealOf<Value>;
  using Vec = VectorOf<Value>;
  constexpr int step = lanes<Real>, count = kDecodeBlock / step;
  Vec scores[count], position, top;
  for (int i = 0; i < step; ++i) position[i] = Real(i);
  for (int i = 0; i < step; ++i) top[i] = Real(-INFINITY);
  const Vec nothing = top;
  const bool masked = from > 0 || to < kDecodeBlock;
  const Real cap = part.softcap, factor = cap > 0 ? part.scale / cap : part.scale;
  for (int i = 0; i < count; ++i) {
    scores[i] = load(part.scores + row * kDecodeBlock + i * step) * factor;
    if (cap > 0) scores[i] = tanh_of(scores[i]) * cap;
    if (masked) {
      const Vec at = position + Real(i * step);
      scores[i] = ((at >= Real(from)) & (at < Real(to))) ? scores[i] : nothing;
    }
    top = scores[i] > top ? scores[i] : top;
  }
  const Real before = part.max[row], block_max = lane_max(top);
  const Real max = block_max > before ? block_max : before;
  // While nothing has been seen, any finite number in the place of the maximum gives zeros.
  const Real shift = max == Real(-INFINITY) ? Real(0) : max;
  auto* weights = reinterpret_cast<Packed<Value>*>(part.weights) + row * kDecodeBlock;
  Vec sum = {};
  for (int i = 0; i < count; ++i) {
    scores[i] = exp_nonpositive(scores[i] - shift);
    sum += scores[i];
    Dot<Value>::pack(weights + i * step, scores[i]);
  }
  Real fade = 1;
  if (max != before) {
    Vec change = {};
    change[0] = before - shift;
    fade = exp_nonpositive(change)[0];
  }
  part.max[row] = max;
  part.fade[row] = fade;
  part.sum[row] = part.sum[row] * fade + lane_sum(sum);
}

// Adds the values of one head to kRows of the rows that read it.
template <int kRows, typename Value>
void weigh_rows(
    const DecodePart<Value>& part, const HeadRows<Value>& values, int64_t count,
    const int32_t* rows, const RowsAhead<Value>& ahead) {
  using Real = RealOf<Value>;
  constexpr int narrow = Dot<Value>::step / lanes<Real>;
  constexpr int wide = kRows == 1 ? 8 : tile_sums<Value> / (kRows == 3 ? 4 : kRows);
  WeighedTile<Value> tile{values.base, values.offsets, count, {}, {}, {}, ahead, 0, 0};
  for (int r = 0; r < kRows; ++r) {
    tile.weights[r] = reinterpret_cast<Packed<Value>*>(part.weights) + rows[r] * kDecodeBlock;
    tile.fade[r] = part.fade[rows[r]];
    tile.weighted[r] = part.weighted + rows[r] * part.weighted_step;
  }
  for (int64_t rest = part.value.dim, columns; rest > 0; rest -= columns) {
    columns = rest;
    tile.fetch_to = rest > wide * lanes<Real> ? tile.fetch_from + wide * lanes<Real> : ahead.dim;
    if (rest >= wide * lanes<Real>) {
      weigh_tile<kRows, wide>(tile, columns = wide * lanes<Real>);
    } else if (wide == 8 && rest >= 4 * lanes<Real>) {
      weigh_tile<kRows, 4>(tile, columns = 4 * lanes<Real>);
    } else if (rest >= narrow * lanes<Real>) {
      weigh_tile<kRows, narrow>(tile, columns = narrow * lanes<Real>);
    } else {
      weigh_tile<kRows, 0>(tile, columns);
    }
    tile.values += columns;
    tile.fetch_from = tile.fetch_to;
    for (int r = 0; r < kRows; ++r) tile.weighted[r] += columns;
  }
}

#if EA_BF16_DOT
// Scores of most of the rows that read one key head, where there are many; says how many.
EA_HOST_DEVICE int64_t score_keys_across(
    const DecodePart<BFloat16>& part, const HeadRows<BFloat16>& keys, int64_t count,
    const HeadReaders& readers, const RowsAhead<BFloat16>& ahead) {
  const int64_t across = rows_across(readers.count, part.key.dim), end = readers.first + across;
  const int64_t tiles = (across + 15) / 16;
  const auto* columns = reinterpret_cast<const BFloat16*>(part.columns);
  for (int64_t t = 0; t < count && across; t += kKeysAcross) {
    const BFloat16* key[kKeysAcross];
    // Past the last token, its own row stands in; what comes of that is masked.
    for (int64_t i = 0; i < kKeysAcross; ++i) {
      key[i] = keys.base + keys.offsets[t + i < count ? t + i : count - 1];
    }
    int64_t asked = 0;
    for (int64_t row = readers.first, tile = 1; row < end; row += 16, ++tile) {
      for (; asked * tiles < kKeysAcross * tile; ++asked) ahead.fetch(t + asked, 0, ahead.dim);
      const auto* queries = columns + row * part.query_step;
      float* scores = part.scores + row * kDecodeBlock + t;
      if (end - row >= 16) {
        score_across<16>(queries, key, part.key.dim, scores, kDecodeBlock);
      } else {
        score_across<8>(queries, key, part.key.dim, scores, kDecodeBlock);
      }
    }
  }
  return across;
}
#endif

// Scores of the rows that read one key head. Four keys at a time meet all of the rows, so that many
// rows do not send the keys through the first-level cache again and again.
template <typename Value>
void score_keys(
    const DecodePart<Value>& part, const HeadRows<Value>& keys, int64_t count,
    const HeadReaders& readers, const RowsAhead<Value>& ahead) {
  constexpr int most = tile_rows<Value>;
  int64_t across = 0;
#if EA_BF16_DOT
  if constexpr (Dot<Value>::interleaves) across = score_keys_across(part, keys, count, readers, ahead);
  if (across == readers.count) return;
#endif
  const int64_t end = readers.first + readers.count;
  const int64_t tiles = (readers.count - across + most - 1) / most;
  for (int64_t t = 0; t < count; t += 4) {
    const Value* key[4];
    // Past the last token, its own row stands in; what comes of that is masked.
    for (int64_t i = 0; i < 4; ++i) {
      key[i] = keys.base + keys.offsets[t + i < count ? t + i : count - 1];
    }
    int64_t asked = across ? 4 : 0;
    for (int64_t row = readers.first + across, tile = 1; row < end; row += most, ++tile) {
      // Spread over the tiles: many requests at once would hold up the products.
      for (; asked * tiles < 4 * tile; ++asked) ahead.fetch(t + asked, 0, ahead.dim);
      const int64_t rows = end - row;
      if (rows >= most) score_rows<most>(part, key, row, t);
      if (rows == 1) score_rows<1>(part, key, row, t);
      if constexpr (most > 2) {
        if (rows == 2) score_rows<2>(part, key, row, t);
        if (rows == 3) score_rows<3>(part, key, row, t);
      }
    }
  }
}

// The first tile of a head asks for the rows ahead.
template <typename Value>
void weigh_values(
    const DecodePart<Value>& part, const HeadRows<Value>& values, int64_t count,
    const HeadReaders& readers, RowsAhead<Value> ahead) {
  constexpr int most = tile_rows<Value>;
  const int32_t* row = part.value_rows + readers.first;
  const int32_t* const end = row + readers.count;
  if constexpr (Dot<Value>::interleaves) {
    for (; row + 8 <= end; row += 8, ahead.count = 0) weigh_rows<8>(part, values, count, row, ahead);
  }
  for (; row + most <= end; row += most, ahead.count = 0) {
    weigh_rows<most>(part, values, count, row, ahead);
  }
  if constexpr (most > 2) {
    if (end - row == 3) weigh_rows<3>(part, values, count, row, ahead);
    if (end - row == 2) weigh_rows<2>(part, values, count, row, ahead);
  }
  if (end - row == 1) weigh_rows<1>(part, values, count, row, ahead);
}

// out = weighted / sum; zeros where nothing was seen.
template <typename Value, typename Out>
void write_row(const DecodePart<Value>& part, int64_t row, Out* out) {
  using Real = RealOf<Value>;
  const Real* weighted = part.weighted + row * part.weighted_step;
  const Real factor = part.sum[row] == 0 ? Real(0) : Real(1) / part.sum[row];
  int64_t d = 0;
  for (; d + lanes<Real> <= part.value.dim; d += lanes<Real>) {
    store(out + d, load(weighted + d) * factor);
  }
  if (d < part.value.dim) {
    store_some(out + d, load(weighted + d) * factor, part.value.dim - d);
  }
}

template <typename Value>
void decode_part(const DecodePart<Value>& part) {
  using Real = RealOf<Value>;
  pack_queries(part);
  for (int64_t r = 0; r < part.rows; ++r) {
    part.max[r] = Real(-INFINITY);
    part.sum[r] = 0;
  }
  std::memset(part.weighted, 0, part.rows * part.weighted_step * sizeof(Real));
  const bool values_in_keys = part.value.data == part.key.data;
  CacheBlock<Value> keys, values, next_keys;
  next_keys.locate(part.key, part.begin, part.end);
  for (int64_t begin = part.begin; begin < part.end; begin += kDecodeBlock) {
    keys = next_keys;
    values.locate(part.value, begin, part.end);
    next_keys.locate(part.key, begin + kDecodeBlock, part.end);
    const int64_t count = keys.count;

    for (int64_t k = 0; k < part.num_key_heads; ++k) {
      const RowsAhead<Value> ahead =
          k + 1 < part.num_key_heads ? rows_ahead(part.key, keys, part.key_heads[k + 1].head)
          : values_in_keys           ? rows_ahead(part.key, next_keys, part.key_heads[0].head)
                                     : rows_ahead(part.value, values, part.value_heads[0].head);
      const HeadRows<Value> rows(part.key, keys, part.key_heads[k].head, part.gathered);
      score_keys(part, rows, count, part.key_heads[k], ahead);
    }
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t last = part.newest + r % part.tokens - begin;
      const int64_t from = part.window_left < 0 ? 0 : last - part.window_left;
      soften_row(part, r, from < 0 ? 0 : from, last < count ? last + 1 : count);
    }
    for (int64_t v = 0; v < part.num_value_heads; ++v) {
      const RowsAhead<Value> ahead =
          v + 1 < part.num_value_heads
              ? rows_ahead(part.value, values, part.value_heads[v + 1].head)
          : values_in_keys ? RowsAhead<Value>{}
                           : rows_ahead(part.key, next_keys, part.key_heads[0].head);
      const HeadRows<Value> rows(part.value, values, part.value_heads[v].head, part.gathered);
      weigh_values(part, rows, count, part.value_heads[v], ahead);
    }
  }
  for (int64_t r = 0; r < part.rows; ++r) {
    *part.lses[r] = log_sum_exp(SoftmaxState<Real>{part.max[r], part.sum[r]});
    if (part.partial) {
      write_row(part, r, part.partial + r * part.value.dim);
    } else {
      write_row(part, r, part.outs[r]);
    }
  }
}
