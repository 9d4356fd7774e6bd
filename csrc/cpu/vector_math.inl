// Vectors of exp and tanh, and sums over lanes. Included by for_each_isa.h, once per instruction set.

// exp(x) for x <= 0, to 2e-7 of its value; zero below -87, where fp32 would be subnormal. The
// exponent is split off, and e^r for |r| <= ln(2) / 2 is a Taylor polynomial of degree 7.
EA_HOST_DEVICE F32 exp_nonpositive(F32 x) {
  const F32 shifted = x * 0x1.715476p+0f + 0x1.8p23f;  // Rounds x / ln(2) into the low bits.
  const F32 power = shifted - 0x1.8p23f;
  const F32 r = (x - power * 0x1.62e4p-1f) - power * 0x1.7f7d1cp-20f;
  F32 e = r * (1.0f / 5040) + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  e *= bits_of<F32>((bits_of<U32>(shifted) + 127) << 23);
  return x < -87.0f ? F32{} : e;
}

EA_HOST_DEVICE F64 exp_nonpositive(F64 x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// tanh(x), to 4e-7 of its value: by exp for large x, where nothing cancels, and by the polynomial
// of Moshier's Cephes library for small.
EA_HOST_DEVICE F32 tanh_of(F32 x) {
  const F32 size = x < 0.0f ? -x : x;
  const F32 e = exp_nonpositive(-2.0f * size);
  const F32 large = (1.0f - e) / (1.0f + e);
  const F32 square = x * x;
  F32 small = square * -5.70498872745e-3f + 2.06390887954e-2f;
  small = small * square - 5.37397155531e-2f;
  small = small * square + 1.33314422036e-1f;
  small = small * square - 3.33332819422e-1f;
  small = small * square * x + x;
  return size < 0.625f ? small : x < 0.0f ? -large : large;
}

EA_HOST_DEVICE F64 tanh_of(F64 x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

template <typename Vec>
EA_HOST_DEVICE auto lane_max(Vec v) {
  auto max = v[0];
  for (size_t i = 1; i < sizeof(v) / sizeof(max); ++i) max = v[i] > max ? v[i] : max;
  return max;
}

template <typename Vec>
EA_HOST_DEVICE auto lane_sum(Vec v) {
  auto sum = v[0];
  for (size_t i = 1; i < sizeof(v) / sizeof(sum); ++i) sum += v[i];
  return sum;
}

// sums[i] = the sum over the lanes of v[i].
template <typename Vec, typename Real>
EA_HOST_DEVICE void sum_lanes_of_4(const Vec (&v)[4], Real* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = lane_sum(v[i]);
}

#if EA_VECTOR_BYTES >= 32
// The lower (0) or upper (1) eight lanes; of eight, all of them.
template <int kHalf>
EA_HOST_DEVICE __m256 half(F32 v) {
#if EA_VECTOR_BYTES == 64
  return _mm512_maskz_extractf32x8_ps(0xff, v, kHalf);  // Unmasked, GCC 12 warns.
#else
  return v;
#endif
}

EA_HOST_DEVICE __m256 half_sum(F32 v) {
  return EA_VECTOR_BYTES == 64 ? _mm256_add_ps(half<0>(v), half<1>(v)) : half<0>(v);
}

EA_HOST_DEVICE void sum_lanes_of_4(const F32 (&v)[4], float* sums) {
  const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(half_sum(v[0]), half_sum(v[1])),
                                       _mm256_hadd_ps(half_sum(v[2]), half_sum(v[3])));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

EA_HOST_DEVICE float lane_sum(F32 v) {
  const __m256 eight = half_sum(v);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  return (four[0] + four[1]) + (four[2] + four[3]);
}

EA_HOST_DEVICE float lane_max(F32 v) {
  const __m256 eight = _mm256_max_ps(half<0>(v), half<1>(v));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const float a = four[0] > four[1] ? four[0] : four[1], b = four[2] > four[3] ? four[2] : four[3];
  return a > b ? a : b;
}
#endif

#if EA_VECTOR_BYTES == 64
// One sum of two lanes each from a and from b, taken by turns.
EA_HOST_DEVICE F32 lane_pair_sums(F32 a, F32 b) {
  return _mm512_maskz_unpacklo_ps(0xffff, a, b) + _mm512_maskz_unpackhi_ps(0xffff, a, b);
}

// The same of the quarters of a vector.
EA_HOST_DEVICE F32 quarter_pair_sums(F32 a, F32 b) {
  return _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x88) +
         _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xdd);
}

// sums[r * step + i] = the sum over the lanes of v[r][i].
EA_HOST_DEVICE void sum_lanes_of_16(const F32 (&v)[4][4], float* sums, int64_t step) {
  F32 fours[4];
  EA_PRAGMA(GCC unroll 4)
  for (int r = 0; r < 4; ++r) {
    const __m512d a = (__m512d)lane_pair_sums(v[r][0], v[r][1]);
    const __m512d b = (__m512d)lane_pair_sums(v[r][2], v[r][3]);
    fours[r] = (F32)_mm512_maskz_unpacklo_pd(0xff, a, b) +
               (F32)_mm512_maskz_unpackhi_pd(0xff, a, b);
  }
  const F32 all = quarter_pair_sums(quarter_pair_sums(fours[0], fours[1]),
                                    quarter_pair_sums(fours[2], fours[3]));
  _mm_storeu_ps(sums, _mm512_maskz_extractf32x4_ps(0xf, all, 0));
  _mm_storeu_ps(sums + step, _mm512_maskz_extractf32x4_ps(0xf, all, 1));
  _mm_storeu_ps(sums + 2 * step, _mm512_maskz_extractf32x4_ps(0xf, all, 2));
  _mm_storeu_ps(sums + 3 * step, _mm512_maskz_extractf32x4_ps(0xf, all, 3));
}
#endif
