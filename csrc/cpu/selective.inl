// Attention of a few queries to selected cached rows. Included by for_each_isa.h, once per instruction
// set.

#include "cpu/decode.inl"

// A bit for each lane that is larger than `bound`.
template <typename Vec, typename Real>
EA_HOST_DEVICE uint64_t lanes_above(Vec v, Real bound) {
  uint64_t bits = 0;
  for (size_t i = 0; i < sizeof(v) / sizeof(Real); ++i) bits |= uint64_t(v[i] > bound) << i;
  return bits;
}

#if EA_VECTOR_BYTES == 64
EA_HOST_DEVICE uint64_t lanes_above(F32 v, float bound) {
  return _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_GT_OQ);
}
#elif EA_VECTOR_BYTES == 32
EA_HOST_DEVICE uint64_t lanes_above(F32 v, float bound) {
  return uint64_t(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(bound), _CMP_GT_OQ)));
}
#endif

// The scores of one row of a block, of which the tokens [from, to) are seen, are kept and join the
// row's softmax and its largest scores.
template <typename Value>
void keep_row(
    const ScorePart<Value>& part, int64_t row, int64_t block, int64_t from, int64_t to) {
  using Real = RealOf<Value>;
  using Vec = VectorOf<Value>;
  constexpr int step = lanes<Real>, count = kDecodeBlock / step, parallel = kTops / step;
  const Real* const at = part.scores + row * kDecodeBlock;
  Real* const kept = part.all_scores + row * part.score_step + block * kDecodeBlock;
  Real* const tops = part.tops + row * part.top_step + block / part.top_blocks * kTops;
  const Real cap = part.softcap, factor = cap > 0 ? part.scale / cap : part.scale;
  Vec scores[count], top[parallel];
  for (int i = 0; i < count; ++i) {
    scores[i] = load(at + i * step) * factor;
    if (cap > 0) scores[i] = tanh_of(scores[i]) * cap;
  }
  if (from > 0 || to < kDecodeBlock) {
    for (int i = 0; i < count; ++i) {
      for (int lane = 0; lane < step; ++lane) {
        const int64_t token = i * step + lane;
        if (token < from || token >= to) scores[i][lane] = Real(-INFINITY);
      }
    }
  }
  for (int i = 0; i < count; ++i) store(kept + i * step, scores[i]);
  const Real before = part.max[row];
  uint64_t larger = 0;
  for (int j = 0; j < parallel; ++j) {
    top[j] = load(tops + j * step);
    for (int i = j; i < count; i += parallel) top[j] = scores[i] > top[j] ? scores[i] : top[j];
    store(tops + j * step, top[j]);
    larger |= lanes_above(top[j], before);
  }
  if (larger) {
    Real max = before;
    for (int j = 0; j < parallel; ++j) {
      for (int lane = 0; lane < step; ++lane) max = top[j][lane] > max ? top[j][lane] : max;
    }
    part.sum[row] *= shifted_exp(before, max);
    part.max[row] = max;
  }
  // While nothing has been seen, any finite number in the place of the maximum gives zeros.
  const Real shift = part.max[row] == Real(-INFINITY) ? Real(0) : part.max[row];
  Vec sum = {};
  for (int i = 0; i < count; ++i) sum += exp_nonpositive(scores[i] - shift);
  part.sum[row] += lane_sum(sum);
}

template <typename Value>
void score_part(const ScorePart<Value>& part) {
  using Real = RealOf<Value>;
  pack_queries<Value>(part);
  for (int64_t r = 0; r < part.rows; ++r) {
    part.max[r] = Real(-INFINITY);
    part.sum[r] = 0;
    for (int64_t i = 0; i < part.tops_of_part; ++i) {
      part.tops[r * part.top_step + i] = Real(-INFINITY);
    }
  }
  CacheBlock<Value> keys, next_keys;
  next_keys.locate(part.key, part.begin, part.end);
  for (int64_t begin = part.begin; begin < part.end; begin += kDecodeBlock) {
    keys = next_keys;
    next_keys.locate(part.key, begin + kDecodeBlock, part.end);
    const HeadReaders& readers = part.key_heads[0];
    const HeadRows<Value> rows(part.key, keys, readers.head, part.gathered);
    score_keys<Value>(part, rows, keys.count, readers, rows_ahead(part.key, next_keys, readers.head));
    for (int64_t r = 0; r < part.rows; ++r) {
      const int64_t last = part.newest + r % part.tokens - begin;
      const int64_t from = part.window_left < 0 ? 0 : last - part.window_left;
      keep_row(part, r, (begin - part.begin) / kDecodeBlock, from < 0 ? 0 : from,
               last < keys.count ? last + 1 : keys.count);
    }
  }
}

// The largest number, about, that `wanted` of `count` scores are above, a multiple of kTops; no score is
// above `most`. Negative infinity if there is none. Halves the range in the order of the bits.
template <typename Real>
Real bound_of_best(const Real* scores, int64_t count, int64_t wanted, Real most) {
  using Bits = std::conditional_t<std::is_same_v<Real, double>, int64_t, int32_t>;
  constexpr int step = lanes<Real>;
  // Its own inverse, and rising with the number.
  const auto in_order = [](Bits bits) {
    return bits ^ ((bits >> (8 * sizeof(Bits) - 1)) & Bits(~(Bits(1) << (8 * sizeof(Bits) - 1))));
  };
  Bits low = in_order(bits_of<Bits>(Real(-INFINITY))), high = in_order(bits_of<Bits>(most));
  while (low + 1 < high) {
    const Bits middle = low / 2 + high / 2 + (low % 2 + high % 2) / 2;
    const Real bound = bits_of<Real>(in_order(middle));
    int64_t above = 0;
    for (int64_t i = 0; i < count; i += step) {
      above += __builtin_popcountll(lanes_above(load(scores + i), bound));
    }
    (above >= wanted ? low : high) = middle;
    if (above == wanted) break;
  }
  return bits_of<Real>(in_order(low));
}

// Finds which of `count` scores, whole blocks of them, are above `below`, in the order of tokens from
// `first` on; scores alone are put beside, and negative infinities to a multiple of kTops behind them.
template <typename Real>
int64_t collect(
    const Real* scores, int64_t count, Real below, int64_t first, Candidate<Real>* found,
    Real* found_scores) {
  constexpr int step = lanes<Real>;
  int64_t next = 0;
  for (int64_t begin = 0; begin < count; begin += kDecodeBlock) {
    uint64_t chosen = 0;
    for (int i = 0; i < kDecodeBlock; i += step) {
      chosen |= lanes_above(load(scores + begin + i), below) << i;
    }
    for (; chosen; chosen &= chosen - 1, ++next) {
      const int64_t at = begin + __builtin_ctzll(chosen);
      found[next] = {scores[at], int32_t(first + at)};
      found_scores[next] = scores[at];
    }
  }
  for (int64_t i = next; i % kTops; ++i) found_scores[i] = Real(-INFINITY);
  return next;
}

// The selected tokens from `first` on, or what there is of them, as a block of the cache.
template <typename Value>
EA_HOST_DEVICE void locate_selected(
    const SelectedRow<Value>& row, int64_t first, CacheBlock<Value>& block) {
  const CachedRows<Value>& cache = row.value;
  block.count = row.count - first < kDecodeBlock ? row.count - first : kDecodeBlock;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t token = row.selected[first + i].token;
    const int64_t page =
        cache.pages.data ? cache.pages.at(token / cache.page_size) : cache.only_page;
    block.offsets[i] = page * cache.page_step + token % cache.page_size * cache.token_step;
    block.gathered[i] = i * cache.dim;
  }
}

template <typename Value>
void attend_to_selected(const SelectedRow<Value>& row) {
  using Real = RealOf<Value>;
  constexpr int step = lanes<Real>;
  for (int64_t d = 0; d < row.weighted_step; ++d) row.weighted[d] = 0;
  row.fade[0] = 1;
  // A score that is not a number is never selected, but must not be hidden.
  Real sum = row.state.sum - row.state.sum;
  // Relative to the best, whose weight is then exact in any precision.
  Real best = Real(-INFINITY);
  for (int64_t i = 0; i < row.count; ++i) {
    best = row.selected[i].score > best ? row.selected[i].score : best;
  }
  const int32_t only = 0;
  CacheBlock<Value> block, next;
  locate_selected(row, 0, next);
  // Selected rows lie anywhere: all of a block are asked for before the first is waited for.
  const RowsAhead<Value> soon = rows_ahead(row.value, next, row.value_head);
  for (int64_t i = 0; i < soon.count; ++i) soon.fetch(i, 0, soon.dim);
  for (int64_t first = 0; first < row.count; first += kDecodeBlock) {
    block = next;
    locate_selected(row, first + kDecodeBlock, next);
    for (int64_t i = 0; i < kDecodeBlock; ++i) {
      row.scores[i] = i < block.count ? row.selected[first + i].score - best : Real(-INFINITY);
    }
    auto* weights = reinterpret_cast<Packed<Value>*>(row.weights);
    for (int64_t i = 0; i < kDecodeBlock; i += step) {
      const auto weight = exp_nonpositive(load(row.scores + i));
      sum += lane_sum(weight);
      Dot<Value>::pack(weights + i, weight);
    }
    const HeadRows<Value> rows(row.value, block, row.value_head, row.gathered);
    weigh_rows<1, Value>(row, rows, block.count, &only, rows_ahead(row.value, next, row.value_head));
  }
  row.sum[0] = sum;
  write_row<Value>(row, 0, row.out);
  // The log-sum-exp is rounded too coarsely to take this from.
  *row.kept = row.state.sum == 0 ? Real(1)
                                 : sum * shifted_exp(best, row.state.max) / row.state.sum;
}
