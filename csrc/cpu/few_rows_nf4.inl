// y = x W^T for a few rows of x, W in NF4 and decoded in registers: with AVX-512, AVX2, and dot instructions. Included once
// per instruction set, by few_rows.inl.

// Whether rows of w start at a block and are whole blocks of 64.
inline bool in_blocks(const Matrix& w) { return w.type == Type::nf4 && w.cols % 64 == 0; }

#if PE_LEVEL >= 2
// 128 values in the order in which few_rows_nf4 meets them: a dword of packed bytes has the indices of 8 weights, the
// first of a byte in its high half; vector j has those that a shift by 4 j brings to the low bits.
inline void by_lookup128(const float* from, float* to) {
  for (int j = 0; j < 8; ++j)
    for (int lane = 0; lane < 16; ++lane) to[16 * j + lane] = from[8 * lane + (j ^ 1)];
}

// Without it the compiler reads the value from memory at each use, and the loads take as long as the arithmetic.
PE_INLINE void keep_in_register(__m512& v) { asm("" : "+v"(v)); }

// The sums of four vectors' lanes, in an order that does not depend on how many are asked for.
inline __m128 sums_of_lanes(const __m512* v, int count) {
  __m256 half[4];
  for (int i = 0; i < 4; ++i) {
    const __m512 from = v[i < count ? i : 0];
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(from), _mm512_extractf32x8_ps(from, 1));
  }
  const __m256 fours = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  return _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1));
}

// Adds the adapter and the bias to the lanes' sums, and writes rows n .. n + kWeightRows of y.
template <int kRows, int kWeightRows>
inline void finish(__m512 (&total)[kWeightRows][kRows], const Matrix& w, int64_t n, const Extra& extra, Type type,
                   void* y) {
  for (int64_t r = 0; r < extra.rank; r += 16) {
    const int count = static_cast<int>(extra.rank - r < 16 ? extra.rank - r : 16);
    for (int i = 0; i < kWeightRows; ++i) {
      const __m512 up = load_vector(extra.b.data, extra.b.type, (n + i) * extra.rank + r, count);
      for (int m = 0; m < kRows; ++m)
        total[i][m] = _mm512_fmadd_ps(up, _mm512_loadu_ps(extra.h + m * extra.stride + r), total[i][m]);
    }
  }
  float bias[4] = {};
  if (extra.bias != nullptr)
    for (int i = 0; i < kWeightRows; ++i) bias[i] = load_one(extra.bias, extra.bias_type, n + i);
  for (int m = 0; m < kRows; ++m) {
    __m512 of_row[kWeightRows];
    for (int i = 0; i < kWeightRows; ++i) of_row[i] = total[i][m];
    float sum[4];
    _mm_storeu_ps(sum, _mm_add_ps(sums_of_lanes(of_row, kWeightRows), _mm_loadu_ps(bias)));
    for (int i = 0; i < kWeightRows; ++i) store_one(y, type, m * w.rows + n + i, sum[i]);
  }
}

// Rows n .. n + kWeightRows of W, a multiple of 64 wide, for kRows rows of x: floats, each `stride` long, by_lookup128.
// y = sum over blocks of absmax * (sum of code * x), so a weight costs one lookup, one shift and kRows multiplications,
// and is not rounded to x's dtype on the way.
template <int kRows, int kWeightRows>
inline void few_rows_nf4(const float* x, int64_t stride, const Matrix& w, const float* scales, int64_t n,
                         const Extra& extra, Type type, void* y) {
  const int64_t blocks = w.cols / 64;
  const uint8_t* packed = static_cast<const uint8_t*>(w.data) + ((n * w.cols) >> 1);
  __m512 total[kWeightRows][kRows];
  for (int i = 0; i < kWeightRows; ++i)
    for (int m = 0; m < kRows; ++m) total[i][m] = _mm512_setzero_ps();
  int64_t ahead = kWeightRows * w.cols / 2;  // the rows after these
  while (ahead < 2048) ahead *= 2;
  __m512 code = _mm512_loadu_ps(kNf4Code);
  keep_in_register(code);
  for (int64_t b = 0; b < blocks; b += 2) {
    __m512i words[kWeightRows];
    __m512 part[kWeightRows][kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
      const uint8_t* from = packed + (i * blocks + b) * 32;
      _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T0);
      words[i] = b + 1 < blocks ? _mm512_loadu_si512(from)
                                : _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m512 v[kWeightRows];
#pragma GCC unroll 4
      for (int i = 0; i < kWeightRows; ++i)
        v[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(words[i], static_cast<unsigned>(4 * j)), code);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        __m512 at = _mm512_loadu_ps(x + m * stride + b * 64 + 16 * j);
        if (kWeightRows > 1) keep_in_register(at);
#pragma GCC unroll 4
        for (int i = 0; i < kWeightRows; ++i)
          part[i][m] = j == 0 ? _mm512_mul_ps(v[i], at) : _mm512_fmadd_ps(v[i], at, part[i][m]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
      const float* s = scales + i * blocks + b;
      const float second = b + 1 < blocks ? s[1] : 0.0f;
      const __m512 scale = _mm512_mask_mov_ps(_mm512_set1_ps(s[0]), 0xFF00, _mm512_set1_ps(second));
      for (int m = 0; m < kRows; ++m) total[i][m] = _mm512_fmadd_ps(part[i][m], scale, total[i][m]);
    }
  }
  finish<kRows, kWeightRows>(total, w, n, extra, type, y);
}
#endif

#if PE_LEVEL == 1
// Byte k of each code.
struct Planes {
  alignas(16) uint8_t byte[4][16];
};

constexpr Planes kCodePlanes = [] {
  Planes planes{};
  for (int c = 0; c < 16; ++c)
    for (int k = 0; k < 4; ++k)
      planes.byte[k][c] = static_cast<uint8_t>(std::bit_cast<uint32_t>(kNf4Code[c]) >> (8 * k));
  return planes;
}();

// 128 values in the order in which few_rows_nf4 meets them: of each block those whose index is the high half of a byte,
// then the others, four of each half of a register at a time.
inline void by_lookup128(const float* from, float* to) {
  for (int i = 0; i < 128; ++i) {
    const int block = i & 64, half = i >> 5 & 1, q = i >> 3 & 3, lane = i >> 2 & 1, e = i & 3;
    to[i] = from[block + 2 * (16 * lane + 4 * q + e) + half];
  }
}

// Row n of W, a multiple of 64 wide, for kRows rows of x: floats, each `stride` long, by_lookup128. As with AVX-512; no
// lookup of AVX2 has a table of 16 floats, but one has 16 bytes, for 32 indices at once: the four bytes of 32 codes, put
// together by twice as many unpacks. Floor, on a processor that has two shuffles a cycle: 13 cycles for 64 weights. Half a
// block is a sum of its own: a longer chain of additions waits for itself.
template <int kRows>
inline void few_rows_nf4(const float* x, int64_t stride, const Matrix& w, const float* scales, int64_t n,
                         const Extra& extra, Type type, void* y) {
  const int64_t blocks = w.cols / 64;
  const uint8_t* packed = static_cast<const uint8_t*>(w.data) + ((n * w.cols) >> 1);
  Floats total[kRows] = {};
  int64_t ahead = w.cols / 2;  // the rows after this
  while (ahead < 2048) ahead *= 2;
  __m256i plane[4];
  for (int k = 0; k < 4; ++k)
    plane[k] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kCodePlanes.byte[k])));
  const __m256i low = _mm256_set1_epi8(15);
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* from = packed + b * 32;
    if (b % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T0);
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256 scale = _mm256_broadcast_ss(scales + b);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i index = _mm256_and_si256(half == 0 ? _mm256_srli_epi16(bytes, 4) : bytes, low);
      __m256 part[kRows];
      __m256i of[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) of[k] = _mm256_shuffle_epi8(plane[k], index);
      const __m256i lower[2] = {_mm256_unpacklo_epi8(of[0], of[1]), _mm256_unpackhi_epi8(of[0], of[1])},
                    upper[2] = {_mm256_unpacklo_epi8(of[2], of[3]), _mm256_unpackhi_epi8(of[2], of[3])};
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const __m256 v = _mm256_castsi256_ps(q % 2 == 0 ? _mm256_unpacklo_epi16(lower[q / 2], upper[q / 2])
                                                        : _mm256_unpackhi_epi16(lower[q / 2], upper[q / 2]));
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
          const __m256 at = _mm256_loadu_ps(x + m * stride + b * 64 + 32 * half + 8 * q);
          part[m] = q == 0 ? _mm256_mul_ps(v, at) : _mm256_fmadd_ps(v, at, part[m]);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) total[m] = multiply_add((Floats)part[m], (Floats)scale, total[m]);
    }
  }
  finish_row<kRows>(total, w, n, extra, type, y);
}
#endif

#if PE_LEVEL == 3
// The same with dot instructions, for rows of bf16, interleaved, zeros beyond K: of a block's 16 values, rounded to bf16 as
// a dense weight's are, a lookup takes 32 at once. Slower where the tile unit is: there the instruction runs at half rate.
template <int kRows, int kWeightRows>
inline void few_rows_nf4_pairs(const uint16_t* x, int64_t stride, const Matrix& w, const float* scales, int64_t n,
                               const Extra& extra, Type type, void* y) {
  const int64_t blocks = w.cols / 64;
  const uint8_t* packed = static_cast<const uint8_t*>(w.data) + ((n * w.cols) >> 1);
  // One sum, whatever the number of rows: a row has the same bits in any batch. Other rows hide its latency.
  __m512 total[kWeightRows][kRows];
  for (int i = 0; i < kWeightRows; ++i)
    for (int m = 0; m < kRows; ++m) total[i][m] = _mm512_setzero_ps();
  int64_t ahead = kWeightRows * w.cols / 2;  // the rows after these
  while (ahead < 2048) ahead *= 2;
  for (int64_t b = 0; b < blocks; b += 2) {
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
      const uint8_t* from = packed + (i * blocks + b) * 32;
      _mm_prefetch(reinterpret_cast<const char*>(from + ahead), _MM_HINT_T0);
      __m512i v[4];
      decode128(from, scales + i * blocks + b, b + 1 < blocks, v);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m)
          total[i][m] = _mm512_dpbf16_ps(total[i][m], (__m512bh)v[q],
                                         (__m512bh)_mm512_loadu_si512(x + m * stride + b * 64 + 32 * q));
      }
    }
  }
  finish<kRows, kWeightRows>(total, w, n, extra, type, y);
}
#endif
