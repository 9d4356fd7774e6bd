// What the tests call on one instruction set. Included by for_each_isa.h, once per instruction set.

#include "cpu/decode.inl"

// values -> Narrow -> values, by the vector conversions; count is a multiple of the lanes.
template <typename Narrow>
void round_trip(float* values, int64_t count) {
  Narrow narrow[lanes<float>];
  for (int64_t i = 0; i < count; i += lanes<float>) {
    store(narrow, load(values + i));
    store(values + i, load(narrow));
  }
}

template <typename Value>
void convert(const float* values, Value* out, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes<float>) {
    const int64_t some = count - i < lanes<float> ? count - i : lanes<float>;
    store_some(out + i, load_some(values + i, some), some);
  }
}

inline void exp_of_all(float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes<float>) {
    store(values + i, exp_nonpositive(load(values + i)));
  }
}

inline void tanh_of_all(float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes<float>) {
    store(values + i, tanh_of(load(values + i)));
  }
}
