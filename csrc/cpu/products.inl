// Small matrix products, in tiles that stay in registers. Included once per instruction set.

#include "cpu/vector_math.inl"

template <typename Real>
using VectorFor = std::conditional_t<std::is_same_v<Real, double>, F64, F32>;

// out[r, ..] = a[r, k] * b[k, ..], summed over k < depth, and over what is in out where `adds` is true:
// where there is a `fade`, fade[r] times that. Entry (r, k) of a is at r * a_row + k * a_step.
template <typename Real>
struct Product {
  const Real* a;
  int64_t a_row, a_step;
  const Real* b;
  int64_t b_step;
  Real* out;
  int64_t out_step;
  int64_t depth;
  bool adds;
  const Real* fade;
};

constexpr int kProductVectors = EA_VECTOR_BYTES == 64 ? 4 : 2;

template <int kRows, int kVectors, typename Real>
void multiply_tile(const Product<Real>& p) {
  using Vec = VectorFor<Real>;
  Vec sums[kRows][kVectors] = {};
  const Real *a = p.a, *b = p.b;
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_step, b += p.b_step) {
    Vec row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * lanes<Real>);
    EA_PRAGMA(GCC unroll 6)
    for (int r = 0; r < kRows; ++r) {
      const Real factor = a[r * p.a_row];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += row[v] * factor;
    }
  }
  // What is there is added last: in a long sum, rounding is that of the sums of parts.
  for (int r = 0; r < kRows; ++r) {
    const Real fade = p.fade ? p.fade[r] : Real(1);
    for (int v = 0; v < kVectors; ++v) {
      Real* out = p.out + r * p.out_step + v * lanes<Real>;
      store(out, p.adds ? load(out) * fade + sums[r][v] : sums[r][v]);
    }
  }
}

template <int kRows, int kVectors, typename Real>
EA_HOST_DEVICE void multiply_rows(Product<Real>& p, int64_t& rows) {
  for (; rows >= kRows; rows -= kRows) {
    multiply_tile<kRows, kVectors>(p);
    p.a += kRows * p.a_row;
    p.out += kRows * p.out_step;
    if (p.fade) p.fade += kRows;
  }
}

template <int kVectors, typename Real>
void multiply_columns(Product<Real> p, int64_t rows) {
  multiply_rows<6, kVectors>(p, rows);
  multiply_rows<4, kVectors>(p, rows);
  multiply_rows<2, kVectors>(p, rows);
  multiply_rows<1, kVectors>(p, rows);
}

// A product of `rows` rows and `columns` columns, the latter rounded up to whole vectors.
template <typename Real>
void multiply(Product<Real> p, int64_t rows, int64_t columns) {
  int64_t vectors = (columns + lanes<Real> - 1) / lanes<Real>;
  while (vectors > 0) {
    const int64_t some = vectors < kProductVectors ? vectors : kProductVectors;
    if (some == 1) multiply_columns<1>(p, rows);
    if (some == 2) multiply_columns<2>(p, rows);
#if EA_VECTOR_BYTES == 64
    if (some == 3) multiply_columns<3>(p, rows);
    if (some == 4) multiply_columns<4>(p, rows);
#endif
    vectors -= some;
    p.b += some * lanes<Real>;
    p.out += some * lanes<Real>;
  }
}
