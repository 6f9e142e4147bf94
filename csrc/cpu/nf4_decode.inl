// NF4 decode: 64 consecutive weights of one block, as float or bfloat16. Included once per instruction set.
//
// 64 weights are 32 packed bytes. Natural order is kept: each 16-bit word holds four indices, so it is copied to the
// four lanes that need it and shifted by 4, 0, 12 or 8 bits; the table lookup then reads the low bits of each lane.

#include "cpu/vector.inl"

// 64 floats. `w` is NF4, i (the flat index of the first) a multiple of 64.
inline void decode64(const Matrix& w, int64_t i, float* out) {
  const uint8_t* packed = static_cast<const uint8_t*>(w.data) + (i >> 1);
  const float scale = w.scale(i >> w.block_shift);
#if PE_LEVEL >= 2
  const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(kNf4Code), _mm512_set1_ps(scale));
  // Lane j of a group of 16 needs byte j / 2, high half first: a dword of 8 indices is spread over 8 lanes.
  const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  for (int g = 0; g < 4; ++g) {
    const __m512i words = _mm512_permutexvar_epi32(_mm512_add_epi32(spread, _mm512_set1_epi32(2 * g)), bytes);
    _mm512_storeu_ps(out + 16 * g, _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), table));
  }
#elif PE_LEVEL == 1
  const __m256 s = _mm256_set1_ps(scale);
  const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(kNf4Code), s),
               high = _mm256_mul_ps(_mm256_loadu_ps(kNf4Code + 8), s);
  const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  for (int g = 0; g < 8; ++g) {
    int32_t dword;
    memcpy(&dword, packed + 4 * g, 4);
    const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(dword), shifts);
    const __m256 from_high =
        _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 becomes the sign: blendv's mask
    _mm256_storeu_ps(out + 8 * g, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                                   _mm256_permutevar8x32_ps(high, index), from_high));
  }
#else
  float table[16];
  for (int c = 0; c < 16; ++c) table[c] = kNf4Code[c] * scale;
  for (int b = 0; b < 32; ++b) {
    out[2 * b] = table[packed[b] >> 4];
    out[2 * b + 1] = table[packed[b] & 15];
  }
#endif
}

#if PE_LEVEL >= 2
// 64 values of a 16-bit type (bf16 or f16) in two registers. kForUnpack orders each register so that unpacklo / unpackhi
// of two such rows give pairs (row, row + 1) of 16 consecutive columns; otherwise the order is natural.
template <bool kForUnpack, bool kBf16 = true>
PE_INLINE void decode64_half(const Matrix& w, int64_t i, __m512i* first, __m512i* second) {
  const uint8_t* packed = static_cast<const uint8_t*>(w.data) + (i >> 1);
  const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(kNf4Code), _mm512_set1_ps(w.scale(i >> w.block_shift)));
  // The index has five bits, one of them garbage: the table is held twice.
  const __m512i table =
      _mm512_broadcast_i64x4(kBf16 ? round_bf16(scaled) : _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
  const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  const __m512i shifts = _mm512_set1_epi64(0x0008000C00000004);
  const __m512i words =
      kForUnpack ? _mm512_setr_epi64(0x0000000000000000, 0x0004000400040004, 0x0001000100010001, 0x0005000500050005,
                                     0x0002000200020002, 0x0006000600060006, 0x0003000300030003, 0x0007000700070007)
                 : _mm512_setr_epi64(0x0000000000000000, 0x0001000100010001, 0x0002000200020002, 0x0003000300030003,
                                     0x0004000400040004, 0x0005000500050005, 0x0006000600060006, 0x0007000700070007);
  const __m512i later = _mm512_add_epi16(words, _mm512_set1_epi16(8));
  *first = _mm512_permutexvar_epi16(_mm512_srlv_epi16(_mm512_permutexvar_epi16(words, bytes), shifts), table);
  *second = _mm512_permutexvar_epi16(_mm512_srlv_epi16(_mm512_permutexvar_epi16(later, bytes), shifts), table);
}
#endif

// n <= 64 values from flat index i, which may lie anywhere; zeros up to 64.
inline void decode_any(const Matrix& w, int64_t i, int n, float* out) {
  for (int j = 0; j < n; ++j) out[j] = kNf4Code[w.code_index(i + j)] * w.scale((i + j) >> w.block_shift);
  for (int j = n; j < 64; ++j) out[j] = 0.0f;
}
