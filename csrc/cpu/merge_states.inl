// Rows of merge_states. Included by for_each_isa.h, once per instruction set.

// out[0 .. kVectors * lanes) = sum over s of weights[s] * parts[s][at ..]. A part of weight zero saw
// nothing and is not read.
template <int kVectors, typename Value, typename Real, typename Out>
EA_HOST_DEVICE void merge_block(
    const Value* const* parts, const Real* weights, int64_t count, int64_t at, Out* out) {
  decltype(load(*parts)) sum[kVectors] = {};
  for (int64_t s = 0; s < count; ++s) {
    if (weights[s] == Real(0)) continue;
    const Value* part = parts[s] + at;
    for (int v = 0; v < kVectors; ++v) sum[v] += load(part + v * lanes<Real>) * weights[s];
  }
  for (int v = 0; v < kVectors; ++v) store(out + at + v * lanes<Real>, sum[v]);
}

template <typename Value, typename Real, typename Out>
EA_HOST_DEVICE void merge_tail(
    const Value* const* parts, const Real* weights, int64_t count, int64_t at, int64_t size,
    Out* out) {
  decltype(load(*parts)) sum = {};
  for (int64_t s = 0; s < count; ++s) {
    if (weights[s] != Real(0)) sum += load_some(parts[s] + at, size) * weights[s];
  }
  store_some(out + at, sum, size);
}

template <typename Value, typename Lse, typename Out = Value>
void merge_rows(MergeRun<Value, Lse, Out>& run) {
  using Real = typename MergeRun<Value, Lse, Out>::Real;
  constexpr int block = 8 * lanes<Real>;
  for (int64_t row = 0; row < run.rows; ++row) {
    for (int64_t s = 0; s < run.count; ++s) run.weights[s] = *run.lses[s];
    *run.lse = merge_weights<Real>(run.weights, run.count, run.weights);

    int64_t at = 0;
    for (; at + block <= run.dim; at += block) {
      merge_block<8>(run.parts, run.weights, run.count, at, run.out);
    }
    for (; at + lanes<Real> <= run.dim; at += lanes<Real>) {
      merge_block<1>(run.parts, run.weights, run.count, at, run.out);
    }
    if (at < run.dim) merge_tail(run.parts, run.weights, run.count, at, run.dim - at, run.out);

    for (int64_t s = 0; s < run.count; ++s) {
      run.parts[s] += run.part_steps[s];
      run.lses[s] += run.lse_steps[s];
    }
    run.out += run.out_step;
    run.lse += run.lse_step;
  }
}
