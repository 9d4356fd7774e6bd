// Vectors of EA_VECTOR_BYTES bytes in the compiler's own extension, with loads and stores that
// convert from and to the 16-bit types. Included by for_each_isa.h, once per instruction set.

template <typename Real>
constexpr int lanes = EA_VECTOR_BYTES / sizeof(Real);

typedef float F32 __attribute__((vector_size(EA_VECTOR_BYTES)));
typedef double F64 __attribute__((vector_size(EA_VECTOR_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(EA_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(EA_VECTOR_BYTES / 2)));

template <typename To, typename From>
EA_HOST_DEVICE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

EA_HOST_DEVICE F32 widen(BFloat16, U16 bits) {
  return bits_of<F32>(__builtin_convertvector(bits, U32) << 16);
}

EA_HOST_DEVICE F32 widen(Half, U16 bits) {
#if EA_VECTOR_BYTES == 64
  return _mm512_maskz_cvtph_ps(0xffff, bits_of<__m256i>(bits));  // Unmasked, GCC 12 warns.
#elif EA_VECTOR_BYTES == 32
  return _mm256_cvtph_ps(bits_of<__m128i>(bits));
#else
  const U32 wide = __builtin_convertvector(bits, U32);
  const U32 magnitude = (wide & 0x7fffu) << 13;
  // The exponent biases differ by 112; multiplying also normalises what is subnormal in fp16.
  const U32 finite = bits_of<U32>(bits_of<F32>(magnitude) * 0x1p112f);
  const U32 value = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
  return bits_of<F32>(value | (wide & 0x8000u) << 16);
#endif
}

// fp32, rounded to nearest even.
EA_HOST_DEVICE U16 narrow(BFloat16, F32 value) {
  const U32 bits = bits_of<U32>(value);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 nan = ((bits >> 16) & 0x8000u) | 0x7fc0u;
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, U16);
}

EA_HOST_DEVICE U16 narrow(Half, F32 value) {
  const U32 bits = bits_of<U32>(value);
  const U32 magnitude = bits & 0x7fffffffu;
  const U32 sign = (bits >> 16) & 0x8000u;
  // Normal in fp16: move the exponent bias and round off 13 bits; a carry may reach the exponent.
  const U32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal in fp16: adding 0.5 rounds to multiples of 2^-24 and leaves their count in the low bits.
  const U32 subnormal = bits_of<U32>(bits_of<F32>(magnitude) + 0.5f) - 0x3f000000u;
  const U32 finite = magnitude < 0x38800000u ? subnormal : normal;
  const U32 infinity = magnitude - magnitude + 0x7c00u;
  const U32 special = magnitude > 0x7f800000u ? infinity + 0x200u : infinity;
  return __builtin_convertvector((magnitude >= 0x477ff000u ? special : finite) | sign, U16);
}

// A vector from memory of any alignment.
EA_HOST_DEVICE F32 load(const float* p) {
  F32 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

EA_HOST_DEVICE F64 load(const double* p) {
  F64 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename Narrow>
EA_HOST_DEVICE F32 load(const Narrow* p) {
  U16 v;
  std::memcpy(&v, p, sizeof(v));
  return widen(Narrow{}, v);
}

EA_HOST_DEVICE void store(float* p, F32 v) { std::memcpy(p, &v, sizeof(v)); }

EA_HOST_DEVICE void store(double* p, F64 v) { std::memcpy(p, &v, sizeof(v)); }

template <typename Narrow>
EA_HOST_DEVICE void store(Narrow* p, F32 v) {
  const U16 bits = narrow(Narrow{}, v);
  std::memcpy(p, &bits, sizeof(bits));
}

// The first `count` lanes; the others are zero, or not written.
template <typename Value>
EA_HOST_DEVICE auto load_some(const Value* p, int64_t count) {
  Value lane[sizeof(load(p)) / 4] = {};
  for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
  return load(lane);
}

#if EA_VECTOR_BYTES == 64
EA_HOST_DEVICE F32 load_some(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
}

template <typename Narrow>
EA_HOST_DEVICE F32 load_some_narrow(const Narrow* p, int64_t count) {
  return widen(Narrow{}, bits_of<U16>(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p)));
}
EA_HOST_DEVICE F32 load_some(const BFloat16* p, int64_t n) { return load_some_narrow(p, n); }
EA_HOST_DEVICE F32 load_some(const Half* p, int64_t n) { return load_some_narrow(p, n); }
#endif

template <typename Value, typename Vector>
EA_HOST_DEVICE void store_some(Value* p, Vector v, int64_t count) {
  Value lane[sizeof(v) / 4];
  store(lane, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lane[i];
}
