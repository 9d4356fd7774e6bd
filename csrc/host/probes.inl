// What the tests call on one instruction set. Included by for_each_isa.h, once per instruction set.

#include "cpu/merge_states.inl"

// values -> Narrow -> values, by the vector conversions; count is a multiple of the lanes.
template <typename Narrow>
void round_trip(float* values, int64_t count) {
  Narrow narrow[lanes<float>];
  for (int64_t i = 0; i < count; i += lanes<float>) {
    store(narrow, load(values + i));
    store(values + i, load(narrow));
  }
}
