// Conversions between the storage types and float, round to nearest even. Included once per instruction set.

inline float to_float(float v) { return v; }

inline float bf16_to_float(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t float_to_bf16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>(v != v ? 0x7FC0 : rounded);
}

inline float f16_to_float(uint16_t v) {
#if PE_LEVEL >= 1
  return _cvtsh_ss(v);
#else
  const uint32_t sign = static_cast<uint32_t>(v & 0x8000) << 16, exponent = v >> 10 & 31, fraction = v & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7F800000 | fraction << 13;
  } else if (exponent != 0) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else {  // zero or subnormal: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-08f;
    memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
#endif
}

inline uint16_t float_to_f16(float v) {
#if PE_LEVEL >= 1
  return static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds beyond 65504
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 lets the addition round to a multiple of 2^-24
    float shifted;
    memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    memcpy(&bits, &shifted, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13));
#endif
}

#if PE_LEVEL >= 2
// 16 floats rounded to bf16.
PE_INLINE __m256i round_bf16(__m512 v) {
#if PE_LEVEL >= 3
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
  return _mm512_cvtepi32_epi16(rounded);
#endif
}

PE_INLINE __m512 widen_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
#endif

// One element of a dense matrix, as float.
inline float load_one(const void* data, Type type, int64_t i) {
  switch (type) {
    case Type::f32:
      return static_cast<const float*>(data)[i];
    case Type::bf16:
      return bf16_to_float(static_cast<const uint16_t*>(data)[i]);
    default:
      return f16_to_float(static_cast<const uint16_t*>(data)[i]);
  }
}

inline void store_one(void* data, Type type, int64_t i, float v) {
  switch (type) {
    case Type::f32:
      static_cast<float*>(data)[i] = v;
      break;
    case Type::bf16:
      static_cast<uint16_t*>(data)[i] = float_to_bf16(v);
      break;
    default:
      static_cast<uint16_t*>(data)[i] = float_to_f16(v);
  }
}

// n contiguous values, n <= 16, from and to a storage type; zeros beyond n.
#if PE_LEVEL >= 2
PE_INLINE __m512 load_vector(const void* data, Type type, int64_t i, int n) {
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  if (type == Type::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + i);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + i);
  return type == Type::bf16 ? widen_bf16(half) : _mm512_cvtph_ps(half);
}
#endif

inline void load_up_to_16(const void* data, Type type, int64_t i, int n, float* out) {
#if PE_LEVEL >= 2
  _mm512_storeu_ps(out, load_vector(data, type, i, n));
#else
  for (int j = 0; j < n; ++j) out[j] = load_one(data, type, i + j);
  for (int j = n; j < 16; ++j) out[j] = 0.0f;
#endif
}

inline void store_up_to_16(void* data, Type type, int64_t i, int n, const float* in) {
#if PE_LEVEL >= 2
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  const __m512 v = _mm512_loadu_ps(in);
  if (type == Type::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(data) + i, mask, v);
    return;
  }
  const __m256i half = type == Type::bf16 ? round_bf16(v) : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(data) + i, mask, half);
#else
  for (int j = 0; j < n; ++j) store_one(data, type, i + j, in[j]);
#endif
}
