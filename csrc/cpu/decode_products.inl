// The two products of attention on tiles of a few rows: scores = queries . keys, and
// weighted = weights . values. Included by decode.inl.

#include "cpu/vector_math.inl"

// Memory of any type in vectors: how wide they are, and how products of them are summed.
template <typename Value>
struct Dot {
  using Packed = RealOf<Value>;  // What queries are stored as.
  static constexpr int step = lanes<Packed>;
  static constexpr bool interleaves = false;  // Whether pairs of rows of values are.
  template <typename T>
  static EA_HOST_DEVICE auto vector(const T* p) { return load(p); }
  template <typename T>
  static EA_HOST_DEVICE auto some(const T* p, int64_t count) { return load_some(p, count); }
  template <typename Vec>
  static EA_HOST_DEVICE Vec add_product(Vec sum, Vec a, Vec b) { return sum + a * b; }
  template <typename Vec>
  static EA_HOST_DEVICE void pack(Packed* p, Vec v) { store(p, v); }
};

#if EA_BF16_DOT
template <>
struct Dot<BFloat16> {
  using Packed = BFloat16;
  static constexpr int step = 32;
  static constexpr bool interleaves = true;
  static EA_HOST_DEVICE __m512i vector(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static EA_HOST_DEVICE __m512i some(const BFloat16* p, int64_t count) {
    return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }
  static EA_HOST_DEVICE F32 add_product(F32 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static EA_HOST_DEVICE void pack(BFloat16* p, F32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
};
#endif

// A tile keeps so many sums in registers, and has so many rows at most. With few registers 8 are best,
// unless values have to be converted: that is shared by the rows, and worth some spilled sums.
template <typename Value>
constexpr int tile_sums = EA_VECTOR_BYTES == 64 || sizeof(Value) == 2 ? 16 : 8;
template <typename Value>
constexpr int tile_rows = tile_sums<Value> / 4;

template <typename Value>
using VectorOf = decltype(load(static_cast<const Value*>(nullptr)));

// scores[r * score_step + t] = queries row r . key t, for kRows queries and 4 keys. Rows of queries are
// padded with zeros to whole vectors.
template <int kRows, typename Value>
EA_HOST_DEVICE void score_tile(
    const typename Dot<Value>::Packed* queries, int64_t query_step, const Value* const (&keys)[4],
    int64_t dim, RealOf<Value>* scores, int64_t score_step) {
  using D = Dot<Value>;
  // Every loop over these is unrolled, or they would have to leave their registers.
  VectorOf<Value> sums[kRows][4] = {};
  int64_t at = 0;
  for (; at + D::step <= dim; at += D::step) {
    const decltype(D::vector(keys[0])) key[4] = {
        D::vector(keys[0] + at), D::vector(keys[1] + at), D::vector(keys[2] + at),
        D::vector(keys[3] + at)};
    EA_PRAGMA(GCC unroll 4)
    for (int r = 0; r < kRows; ++r) {
      const auto query = D::vector(queries + r * query_step + at);
      EA_PRAGMA(GCC unroll 4)
      for (int t = 0; t < 4; ++t) sums[r][t] = D::add_product(sums[r][t], query, key[t]);
    }
  }
  if (at < dim) {
    EA_PRAGMA(GCC unroll 4)
    for (int t = 0; t < 4; ++t) {
      const auto key = D::some(keys[t] + at, dim - at);
      EA_PRAGMA(GCC unroll 4)
      for (int r = 0; r < kRows; ++r) {
        sums[r][t] = D::add_product(sums[r][t], D::vector(queries + r * query_step + at), key);
      }
    }
  }
#if EA_VECTOR_BYTES == 64
  if constexpr (kRows == 4 && std::is_same_v<RealOf<Value>, float>) {
    sum_lanes_of_16(sums, scores, score_step);
    return;
  }
#endif
  EA_PRAGMA(GCC unroll 4)
  for (int r = 0; r < kRows; ++r) sum_lanes_of_4(sums[r], scores + r * score_step);
}

#if EA_BF16_DOT
// The same with rows across the lanes of a vector: then no score is a sum over all lanes. Of 16 rows, a
// column has two channels; of 8 rows four, two in each of neighbouring lanes. Keys are broadcast.
constexpr int kKeysAcross = 8;

template <int kRows>
using Broadcast = std::conditional_t<kRows == 16, int32_t, int64_t>;

EA_HOST_DEVICE __m512bh everywhere(int32_t channels) { return (__m512bh)_mm512_set1_epi32(channels); }
EA_HOST_DEVICE __m512bh everywhere(int64_t channels) { return (__m512bh)_mm512_set1_epi64(channels); }

template <int kControl>
EA_HOST_DEVICE F32 pick(F32 a, F32 b) {
  return _mm512_maskz_shuffle_ps(0xffff, a, b, kControl);
}

EA_HOST_DEVICE void store_quarters(F32 v, float* scores, int64_t step) {
  _mm_storeu_ps(scores, _mm512_maskz_extractf32x4_ps(0xf, v, 0));
  _mm_storeu_ps(scores + step, _mm512_maskz_extractf32x4_ps(0xf, v, 1));
  _mm_storeu_ps(scores + 2 * step, _mm512_maskz_extractf32x4_ps(0xf, v, 2));
  _mm_storeu_ps(scores + 3 * step, _mm512_maskz_extractf32x4_ps(0xf, v, 3));
}

// Sums of four keys, rows across the lanes, to scores[r * step + key].
template <int kRows>
EA_HOST_DEVICE void store_across(const F32* keys, float* scores, int64_t step) {
  if constexpr (kRows == 16) {
    const F32 a = _mm512_maskz_unpacklo_ps(0xffff, keys[0], keys[1]);
    const F32 b = _mm512_maskz_unpackhi_ps(0xffff, keys[0], keys[1]);
    const F32 c = _mm512_maskz_unpacklo_ps(0xffff, keys[2], keys[3]);
    const F32 d = _mm512_maskz_unpackhi_ps(0xffff, keys[2], keys[3]);
    store_quarters(pick<0x44>(a, c), scores, 4 * step);
    store_quarters(pick<0xee>(a, c), scores + step, 4 * step);
    store_quarters(pick<0x44>(b, d), scores + 2 * step, 4 * step);
    store_quarters(pick<0xee>(b, d), scores + 3 * step, 4 * step);
  } else {
    const F32 a = pick<0x88>(keys[0], keys[1]) + pick<0xdd>(keys[0], keys[1]);
    const F32 b = pick<0x88>(keys[2], keys[3]) + pick<0xdd>(keys[2], keys[3]);
    store_quarters(pick<0x88>(a, b), scores, 2 * step);
    store_quarters(pick<0xdd>(a, b), scores + step, 2 * step);
  }
}

// scores[r * step + t] = row r of the queries in `columns` . key t, for 8 keys of `dim` channels, a multiple
// of 4.
template <int kRows>
EA_HOST_DEVICE void score_across(
    const BFloat16* columns, const BFloat16* const (&keys)[kKeysAcross], int64_t dim, float* scores,
    int64_t step) {
  constexpr int channels = 32 / kRows;
  F32 sums[kKeysAcross] = {};
  for (int64_t at = 0; at < dim; at += channels, columns += 32) {
    const __m512bh column = (__m512bh)_mm512_loadu_si512(columns);
    EA_PRAGMA(GCC unroll 8)
    for (int t = 0; t < kKeysAcross; ++t) {
      Broadcast<kRows> some;
      std::memcpy(&some, keys[t] + at, sizeof(some));
      sums[t] = _mm512_dpbf16_ps(sums[t], column, everywhere(some));
    }
  }
  for (int t = 0; t < kKeysAcross; t += 4) store_across<kRows>(sums + t, scores + t, step);
}
#endif

// Rows that are wanted next. They are asked for while the ones before them are multiplied, so that
// memory is never idle.
template <typename Value>
struct RowsAhead {
  const Value* base;
  const int64_t* offsets;
  int64_t count, dim;

  EA_HOST_DEVICE void fetch(int64_t t, int64_t from, int64_t to) const {
    constexpr int64_t line = 64 / sizeof(Value);
    if (t >= count) return;
    const Value* row = base + offsets[t];
    for (int64_t d = from; d < to; d += line) __builtin_prefetch(row + d, 0, 2);
  }
};

// A tile of `weighted`: rows[r] of it, from one column on.
template <typename Value>
struct WeighedTile {
  using Real = RealOf<Value>;
  const Value* values;       // the head, at the first column of the tile
  const int64_t* offsets;    // of each token in it
  int64_t tokens;
  const typename Dot<Value>::Packed* weights[8];
  Real fade[8];              // what is there already counts so much
  Real* weighted[8];         // at the first column of the tile
  RowsAhead<Value> ahead;    // to be fetched meanwhile, in these columns
  int64_t fetch_from, fetch_to;
};

// weighted[r][..] = fade[r] * weighted[r][..] + sum over t of weights[r][t] * values[t][..], for
// kVectors vectors of columns; with kVectors = 0 for the first `columns` of a single one.
template <int kRows, int kVectors, typename Value>
EA_HOST_DEVICE void weigh_tile(const WeighedTile<Value>& tile, int64_t columns) {
  using Real = RealOf<Value>;
  constexpr int count = kVectors ? kVectors : 1;
  VectorOf<Value> sums[kRows][count];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < count; ++v) {
      sums[r][v] = load(tile.weighted[r] + v * lanes<Real>) * tile.fade[r];
    }
  }
  for (int64_t t = 0; t < tile.tokens; ++t) {
    tile.ahead.fetch(t, tile.fetch_from, tile.fetch_to);
    const Value* row = tile.values + tile.offsets[t];
    for (int v = 0; v < count; ++v) {
      const auto value = kVectors ? load(row + v * lanes<Real>) : load_some(row, columns);
      for (int r = 0; r < kRows; ++r) sums[r][v] += value * tile.weights[r][t];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < count; ++v) store(tile.weighted[r] + v * lanes<Real>, sums[r][v]);
  }
}

#if EA_BF16_DOT
// Here a product sums two tokens: their rows are interleaved, and two weights are broadcast.
template <int kRows, int kVectors>
EA_HOST_DEVICE void weigh_tile(const WeighedTile<BFloat16>& tile, int64_t columns) {
  using D = Dot<BFloat16>;
  constexpr int count = kVectors ? kVectors / 2 : 1;
  F32 sums[kRows][count][2];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < count; ++v) {
      for (int half = 0; half < 2; ++half) {
        sums[r][v][half] = load(tile.weighted[r] + 32 * v + 16 * half) * tile.fade[r];
      }
    }
  }
  __m512i low, high;
  {
    uint16_t index[2][32];
    for (int i = 0; i < 32; ++i) {
      index[0][i] = uint16_t(i / 2 + 32 * (i % 2));
      index[1][i] = uint16_t(index[0][i] + 16);
    }
    low = _mm512_loadu_si512(index[0]);
    high = _mm512_loadu_si512(index[1]);
  }
  for (int64_t t = 0; t < tile.tokens; t += 2) {
    tile.ahead.fetch(t, tile.fetch_from, tile.fetch_to);
    tile.ahead.fetch(t + 1, tile.fetch_from, tile.fetch_to);
    const BFloat16* row = tile.values + tile.offsets[t];
    // The weight of what follows the last token is zero, and it is not read.
    const BFloat16* next = t + 1 < tile.tokens ? tile.values + tile.offsets[t + 1] : row;
    for (int v = 0; v < count; ++v) {
      const auto a = kVectors ? D::vector(row + 32 * v) : D::some(row, columns);
      const auto b = kVectors ? D::vector(next + 32 * v) : D::some(next, columns);
      const __m512i pairs[2] = {_mm512_permutex2var_epi16(a, low, b),
                                _mm512_permutex2var_epi16(a, high, b)};
      for (int r = 0; r < kRows; ++r) {
        int32_t two;
        std::memcpy(&two, tile.weights[r] + t, sizeof(two));
        for (int half = 0; half < 2; ++half) {
          sums[r][v][half] =
              D::add_product(sums[r][v][half], _mm512_set1_epi32(two), pairs[half]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < count; ++v) {
      for (int half = 0; half < 2; ++half) store(tile.weighted[r] + 32 * v + 16 * half, sums[r][v][half]);
    }
  }
}
#endif
