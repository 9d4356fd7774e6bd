// Projections of rows. Included by for_each_isa.h, once per instruction set.

#include "cpu/products.inl"

// out[i, ..] = row i * normals, for normals (dim, kProjections).
inline void project_rows(
    const float* rows, int64_t row_step, int64_t count, int64_t dim, const float* normals,
    float* out) {
  multiply<float>({rows, row_step, 1, normals, kProjections, out, kProjections, dim, false, nullptr},
                  count, kProjections);
}

template <typename Value>
void to_float(const Value* row, int64_t dim, float* copy) {
  int64_t d = 0;
  for (; d + lanes<float> <= dim; d += lanes<float>) store(copy + d, load(row + d));
  if (d < dim) store(copy + d, load_some(row + d, dim - d));
}

template <>
inline void to_float(const double* row, int64_t dim, float* copy) {
  for (int64_t d = 0; d < dim; ++d) copy[d] = float(row[d]);
}
