// Vectors of kWidth floats for the element-wise kernels and the small products of attention, written once with the
// compiler's vector extension and compiled per instruction set. Included once per instruction set.
#include "cpu/convert.inl"

#if PE_LEVEL >= 2
constexpr int kWidth = 16;
#elif PE_LEVEL == 1
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

// A storage type as a template argument; f16 and bf16 are both 16 bits wide.
struct F32 {
  using Value = float;
  static constexpr Type type = Type::f32;
};
struct Bf16 {
  using Value = uint16_t;
  static constexpr Type type = Type::bf16;
};
struct F16 {
  using Value = uint16_t;
  static constexpr Type type = Type::f16;
};

// Calls body(tag) with the tag of a storage type.
template <class Body>
inline void with_type(Type type, const Body& body) {
  if (type == Type::f32) {
    body(F32{});
  } else if (type == Type::bf16) {
    body(Bf16{});
  } else {
    body(F16{});
  }
}

inline Floats all(float v) { return Floats{} + v; }

// sum + a b, rounded once where the instruction set does so (floats are not contracted by the compiler).
PE_INLINE Floats multiply_add(Floats a, Floats b, Floats sum) {
#if PE_LEVEL >= 2
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif PE_LEVEL == 1
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return a * b + sum;
#endif
}

template <class T>
inline Floats load(const typename T::Value* p) {
  if constexpr (T::type == Type::f32) {
    Floats out;
    memcpy(&out, p, sizeof(out));
    return out;
  } else if constexpr (T::type == Type::bf16) {
    Halves half;
    memcpy(&half, p, sizeof(half));
    return (Floats)(__builtin_convertvector(half, Words) << 16);
  } else {
#if PE_LEVEL >= 2
    return (Floats)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif PE_LEVEL == 1
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Floats out;
    for (int i = 0; i < kWidth; ++i) out[i] = f16_to_float(p[i]);
    return out;
#endif
  }
}

template <class T>
inline void store(typename T::Value* p, Floats v) {
  if constexpr (T::type == Type::f32) {
    memcpy(p, &v, sizeof(v));
  } else if constexpr (T::type == Type::bf16) {
#if PE_LEVEL >= 3
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    const Words bits = (Words)v, rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const Words nan = (Words)(v != v);
    const Halves half = __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0), Halves);
    memcpy(p, &half, sizeof(half));
#endif
  } else {
#if PE_LEVEL >= 2
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif PE_LEVEL == 1
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kWidth; ++i) p[i] = float_to_f16(v[i]);
#endif
  }
}

// The first n of kWidth values; the rest reads as zero and is not written.
template <class T>
inline Floats load(const typename T::Value* p, int64_t n) {
  if (n >= kWidth) return load<T>(p);
#if PE_LEVEL >= 2
  const auto there = static_cast<__mmask16>((1u << n) - 1);  // without a detour through memory
  if constexpr (T::type == Type::f32) return (Floats)_mm512_maskz_loadu_ps(there, p);
  const __m256i half = _mm256_maskz_loadu_epi16(there, p);
  if constexpr (T::type == Type::bf16) return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  return (Floats)_mm512_maskz_cvtph_ps(0xFFFF, half);
#endif
  typename T::Value part[kWidth] = {};
  memcpy(part, p, n * sizeof(part[0]));
  return load<T>(part);
}

template <class T>
inline void store(typename T::Value* p, Floats v, int64_t n) {
  if (n >= kWidth) return store<T>(p, v);
  typename T::Value part[kWidth];
  store<T>(part, v);
  memcpy(p, part, n * sizeof(part[0]));
}

inline float sum(Floats v) {
  float out = 0.0f;
  for (int i = 0; i < kWidth; ++i) out += v[i];
  return out;
}

inline Floats at_least(Floats a, Floats b) { return a > b ? a : b; }
inline Floats at_most(Floats a, Floats b) { return a < b ? a : b; }

// e^x to about one unit in the last place: 2^n e^r with |r| <= ln(2) / 2 and a polynomial for e^r (Cephes, expf).
// Below -87.3 the result is 0, above 88.7 infinity; a NaN stays one.
inline Floats exponential(Floats x) {
  const Floats clamped = at_most(at_least(x, all(-87.3f)), all(88.7f));
  const Floats shifter = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (clamped * 1.44269504088896341f + shifter) - shifter;
  const Floats r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // n may be 128: two factors, each in range.
  const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
  const Floats scaled = p * (Floats)((half + 127) << 23) * (Floats)((whole - half + 127) << 23);
  Floats out = x < all(-87.3f) ? all(0.0f) : scaled;
  out = x > all(88.7f) ? all(__builtin_inff()) : out;
  return x != x ? x : out;
}
