// y = x W^T for a few rows of x: the packed weight is read once and decoded in registers. Included once per instruction
// set. Floor: the packed bytes over the memory bandwidth.

constexpr int kRowsAtOnce = 4;  // their sums fit the registers

inline float sum16(const float* v) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = v[i] + v[i + 8];
  for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// Adds the products of 64 pairs to 16 sums.
inline void add_dot64(const float* a, const float* b, float* lanes) {
  for (int j = 0; j < 16; ++j)
    lanes[j] += (a[j] * b[j] + a[16 + j] * b[16 + j]) + (a[32 + j] * b[32 + j] + a[48 + j] * b[48 + j]);
}

// The part of row n of y that is not the base product, for each row of x.
inline void extras(const Extra& extra, int64_t n, int rows, float* out) {
  const float bias = extra.bias == nullptr ? 0.0f : load_one(extra.bias, extra.bias_type, n);
  float lanes[kRowsAtOnce][16] = {};
  for (int64_t r = 0; r < extra.rank; r += 16) {
    float b[16];
    load_up_to_16(extra.b.data, extra.b.type, n * extra.rank + r,
                  static_cast<int>(extra.rank - r < 16 ? extra.rank - r : 16), b);
    for (int m = 0; m < rows; ++m)
      for (int j = 0; j < 16; ++j) lanes[m][j] += b[j] * extra.h[m * extra.stride + r + j];
  }
  for (int m = 0; m < rows; ++m) out[m] = bias + sum16(lanes[m]);
}

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
  __m256 total[kRows];
  for (int m = 0; m < kRows; ++m) total[m] = _mm256_setzero_ps();
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
      for (int m = 0; m < kRows; ++m) total[m] = _mm256_fmadd_ps(part[m], scale, total[m]);
    }
  }
  with_type(extra.b.type, [&](auto t) {
    using T = decltype(t);
    const auto* up = static_cast<const typename T::Value*>(extra.b.data) + n * extra.rank;
    for (int64_t r = 0; r < extra.rank; r += 8) {
      const __m256 of_row = (__m256)load<T>(up + r, extra.rank - r);
      for (int m = 0; m < kRows; ++m)
        total[m] = _mm256_fmadd_ps(of_row, _mm256_loadu_ps(extra.h + m * extra.stride + r), total[m]);
    }
  });
  const float bias = extra.bias == nullptr ? 0.0f : load_one(extra.bias, extra.bias_type, n);
  for (int m = 0; m < kRows; ++m) {
    const __m128 fours = _mm_add_ps(_mm256_castps256_ps128(total[m]), _mm256_extractf128_ps(total[m], 1));
    const __m128 twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
    store_one(y, type, m * w.rows + n, _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos))) + bias);
  }
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

#if PE_LEVEL >= 3
// x: rows of bf16, each `stride` values long, zeros beyond K; the weight anything that is read as bf16.
template <int kRows>
inline void few_rows_bf16(const uint16_t* x, int64_t stride, const Source& w, int64_t n0, int64_t n1,
                          const Extra& extra, Type type, void* y) {
  for (int64_t n = n0; n < n1; ++n) {
    __m512 sum[kRows][4];  // a dot instruction waits for the one before it on the same sum: four are in flight
    for (int m = 0; m < kRows; ++m)
      for (int q = 0; q < 4; ++q) sum[m][q] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int64_t k = 0; k < w.m.cols; k += 128) {
      __m512i v[4];
      if (w.m.type == Type::bf16) {  // the processor's own prefetch stops at each page
        const char* ahead = static_cast<const char*>(w.m.data) + 2 * (n * w.m.cols + k) + 4096;
        for (int line = 0; line < 256; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
      }
      read64_bf16(w, n, k, &v[0], &v[1]);
      read64_bf16(w, n, k + 64, &v[2], &v[3]);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q)
        for (int m = 0; m < kRows; ++m)
          sum[m][q] =
              _mm512_dpbf16_ps(sum[m][q], (__m512bh)v[q], (__m512bh)_mm512_loadu_si512(x + m * stride + k + q * 32));
    }
    float add[kRows];
    extras(extra, n, kRows, add);
    for (int m = 0; m < kRows; ++m)
      store_one(y, type, m * w.m.rows + n,
                _mm512_reduce_add_ps(
                    _mm512_add_ps(_mm512_add_ps(sum[m][0], sum[m][1]), _mm512_add_ps(sum[m][2], sum[m][3]))) +
                    add[m]);
  }
}
#endif

// x: rows of floats, each `stride` long, zeros beyond K.
template <int kRows>
inline void few_rows_f32(const float* x, int64_t stride, const Source& w, int64_t n0, int64_t n1, const Extra& extra,
                         Type type, void* y) {
  for (int64_t n = n0; n < n1; ++n) {
    float sum[kRows][16] = {};
    for (int64_t k = 0; k < w.m.cols; k += 64) {
      float v[64];
      read64(w, n, k, v);
      for (int m = 0; m < kRows; ++m)
        for (int j = 0; j < 64; j += 16)
          for (int l = 0; l < 16; ++l) sum[m][l] += x[m * stride + k + j + l] * v[j + l];
    }
    float add[kRows];
    extras(extra, n, kRows, add);
    for (int m = 0; m < kRows; ++m) store_one(y, type, m * w.m.rows + n, sum16(sum[m]) + add[m]);
  }
}

// The most rows for which this is faster than panels: of NF4 looked up in registers more than of what goes through floats
// in memory. us on two threads of a Zen 4, here / by panels: NF4 in float32, 12 rows of 576x1536 and 2048x2048 181 / 231 and
// 692 / 1216; NF4 in bf16, 8 rows of 576x576, 576x1536 and 4096x4096 46 / 49, 76 / 132 and 1150 / 2300, 12 rows 64 / 49,
// 109 / 133 and 1680 / 2300; dense bf16 of 576x1536 and 2048x2048, 4 rows 97 / 124 and 349 / 858, 8 rows 188 / 121 and
// 666 / 841; dense float32, 4 rows 127 / 268 and 1177 / 1484, 12 rows 344 / 236. AMX, 4096x4096 dense bf16 with r=16, ms: 4
// rows 0.84 / 1.09, 5 rows 1.10 / 1.08. AVX2 (a Zen 3), NF4 in float32, 12 rows of 576x576 and 4096x4096 137 / 178 and 4930 /
// 5650, 16 rows 176 / 171 and 6540 / 5650; in bf16 the same.
template <bool kPairs>
inline int64_t most_few_rows(const Matrix& w) {
#if PE_LEVEL >= 1
  if (in_blocks(w) && !(kPairs && PE_LEVEL >= 4)) return kPairs && w.rows * w.cols < (1 << 19) ? 8 : 12;
#endif
  return 4;
}

// How few_rows takes x.
enum class Take { floats, by_lookup, bf16, interleaved };

template <bool kPairs>
inline Take few_rows_take(const Matrix& w) {
#if PE_LEVEL == 3
  if (kPairs && in_blocks(w)) return Take::interleaved;
#endif
#if PE_LEVEL >= 1
  if (in_blocks(w)) return Take::by_lookup;
#endif
  return kPairs ? Take::bf16 : Take::floats;
}

// Rows [n0, n1) of W for kRows rows of x.
template <int kRows>
inline void few_rows(const void* x, int64_t stride, Take take, const Source& w, int64_t n0, int64_t n1,
                     const Extra& extra, Type type, void* y) {
  const float* from = static_cast<const float*>(x);
#if PE_LEVEL == 1
  if (take == Take::by_lookup) {
    const int64_t blocks = w.m.cols / 64;
    float* all = scratch<float>(Slot::few_rows, (n1 - n0) * blocks);
    read_scales(w.m, n0 * w.m.cols, (n1 - n0) * blocks, all);
    for (int64_t n = n0; n < n1; ++n)
      few_rows_nf4<kRows>(from, stride, w.m, all + (n - n0) * blocks, n, extra, type, y);
    return;
  }
#elif PE_LEVEL >= 2
  if (take == Take::by_lookup || take == Take::interleaved) {
    const int64_t blocks = w.m.cols / 64;
    float* all = scratch<float>(Slot::few_rows, (n1 - n0) * blocks);
    read_scales(w.m, n0 * w.m.cols, (n1 - n0) * blocks, all);
    const auto rows_of_weight = [&](auto count, int64_t n) {
      const float* scales = all + (n - n0) * blocks;
#if PE_LEVEL == 3
      if (take == Take::interleaved) {
        few_rows_nf4_pairs<kRows, count.value>(static_cast<const uint16_t*>(x), stride, w.m, scales, n, extra, type, y);
        return;
      }
#endif
      few_rows_nf4<kRows, count.value>(from, stride, w.m, scales, n, extra, type, y);
    };
    int64_t n = n0;
    // More rows of W at once spare loads of x and hide the sums' latency, but read as many streams: of long rows, two
    // are faster for floats.
    if constexpr (kRows == 1)
      for (; (w.m.cols <= 2048 || take == Take::interleaved) && n + 4 <= n1; n += 4)
        rows_of_weight(std::integral_constant<int, 4>(), n);
    for (; n + 2 <= n1; n += 2) rows_of_weight(std::integral_constant<int, 2>(), n);
    for (; n < n1; ++n) rows_of_weight(std::integral_constant<int, 1>(), n);
    return;
  }
#endif
#if PE_LEVEL >= 3
  if (take == Take::bf16) {
    few_rows_bf16<kRows>(static_cast<const uint16_t*>(x), stride, w, n0, n1, extra, type, y);
    return;
  }
#endif
  few_rows_f32<kRows>(from, stride, w, n0, n1, extra, type, y);
}

// The same for `rows` <= kRowsAtOnce.
inline void few_rows(const void* x, int64_t stride, Take take, int rows, const Source& w, int64_t n0, int64_t n1,
                     const Extra& extra, Type type, void* y) {
  if (rows == 1) few_rows<1>(x, stride, take, w, n0, n1, extra, type, y);
  else if (rows == 2) few_rows<2>(x, stride, take, w, n0, n1, extra, type, y);
  else if (rows == 3) few_rows<3>(x, stride, take, w, n0, n1, extra, type, y);
  else few_rows<4>(x, stride, take, w, n0, n1, extra, type, y);
}
