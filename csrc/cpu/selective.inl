// Attention of a few queries to selected cached rows. Included by for_each_isa.h, once per instruction
// set.

#include "cpu/decode.inl"

// The best candidates of a row alone stay, and the worst of them is the floor from now on.
template <typename Value>
void thin_out(const ScorePart<Value>& part, int64_t row) {
  auto* candidates = part.candidates + row * part.room;
  part.counts[row] = select_best(
      candidates, part.counts[row], double(part.most),
      [](const auto* first, const auto* last) { return double(last - first); });
  if (part.counts[row] < part.most) return;
  RealOf<Value> worst = candidates[0].score;
  for (int64_t i = 1; i < part.most; ++i) {
    worst = candidates[i].score < worst ? candidates[i].score : worst;
  }
  if (worst > part.floors[row]) part.floors[row] = worst;
}

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

// The scores of one row of a block that begins at token `begin` join its softmax and its candidates.
// Only the tokens [from, to) of the block are seen. A later token never displaces one of equal score,
// so being above the floor decides.
template <typename Value>
void sift_row(
    const ScorePart<Value>& part, int64_t row, int64_t begin, int64_t from, int64_t to) {
  using Real = RealOf<Value>;
  using Vec = VectorOf<Value>;
  constexpr int step = lanes<Real>, count = kDecodeBlock / step;
  Real* const at = part.scores + row * kDecodeBlock;
  const Real cap = part.softcap, factor = cap > 0 ? part.scale / cap : part.scale;
  Vec scores[count];
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
  const Real before = part.max[row];
  uint64_t larger = 0;
  for (int i = 0; i < count; ++i) larger |= lanes_above(scores[i], before);
  if (larger) {
    Vec top = scores[0];
    for (int i = 1; i < count; ++i) top = scores[i] > top ? scores[i] : top;
    Real max = before;
    for (int lane = 0; lane < step; ++lane) max = top[lane] > max ? top[lane] : max;
    part.sum[row] *= shifted_exp(before, max);
    part.max[row] = max;
    if (!part.most) part.floors[row] = max + part.margin;
  }
  // While nothing has been seen, any finite number in the place of the maximum gives zeros.
  const Real shift = part.max[row] == Real(-INFINITY) ? Real(0) : part.max[row];
  Vec sum = {};
  for (int i = 0; i < count; ++i) sum += exp_nonpositive(scores[i] - shift);
  part.sum[row] += lane_sum(sum);

  const auto above_floor = [&] {
    uint64_t bits = 0;
    for (int i = 0; i < count; ++i) {
      bits |= lanes_above(scores[i], part.floors[row]) << (i * step);
    }
    return bits;
  };
  uint64_t chosen = above_floor();
  if (!chosen) return;
  if (part.counts[row] + kDecodeBlock > part.room) {
    thin_out(part, row);
    chosen = above_floor();
  }
  for (int i = 0; i < count; ++i) store(at + i * step, scores[i]);
  auto* next = part.candidates + row * part.room + part.counts[row];
  for (; chosen; chosen &= chosen - 1) {
    const int64_t token = __builtin_ctzll(chosen);
    *next++ = {at[token], int32_t(begin + token)};
  }
  part.counts[row] = next - (part.candidates + row * part.room);
}

template <typename Value>
void score_part(const ScorePart<Value>& part) {
  using Real = RealOf<Value>;
  pack_queries<Value>(part);
  for (int64_t r = 0; r < part.rows; ++r) {
    part.max[r] = Real(-INFINITY);
    part.sum[r] = 0;
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
      sift_row(part, r, begin, from < 0 ? 0 : from, last < keys.count ? last + 1 : keys.count);
    }
  }
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
