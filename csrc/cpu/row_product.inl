// The product of two rows. Included by for_each_isa.h, once per instruction set.

#include "cpu/products.inl"

template <typename Value>
RealOf<Value> row_product(const Value* a, const Value* b, int64_t dim) {
  using Real = RealOf<Value>;
  VectorFor<Real> sum = {};
  int64_t d = 0;
  for (; d + lanes<Real> <= dim; d += lanes<Real>) sum += load(a + d) * load(b + d);
  if (d < dim) sum += load_some(a + d, dim - d) * load_some(b + d, dim - d);
  return lane_sum(sum);
}
