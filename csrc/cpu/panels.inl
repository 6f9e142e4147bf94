// Operands of the tile products: dense, NF4 and masked matrices laid out as tiles. Included once per instruction set.
//
// Contractions along a weight's row of NF4 pairs take the values of each 128 in an order in which decoding is cheapest:
// the packed bytes are 32 words of four indices, and register q holds the q-th index, from the low bits, of every word.
// The other operand is laid out in the same order ("interleaved"), and a sum does not care.

#include "cpu/nf4_decode.inl"
#include "cpu/tiles.inl"
#include "cpu/dropout_mask.inl"

// A product of fewer multiplications than this is not worth waking a second thread.
constexpr int64_t kWorthThreads = 1 << 19;

template <class F>
inline void in_parallel(int64_t n, bool worth_it, const F& f) {
  if (worth_it) torch::stable::parallel_for(0, n, 1, f);
  else if (n > 0) f(0, n);
}

// A matrix as an operand reads it: with what lies outside of it, and what dropout takes, as zeros.
struct Source {
  Matrix m;
  Dropout dropout;
  // Of a matrix read through a LayerNorm: the mean and rstd of each row, and for each column, up to a multiple of 64,
  // what it is multiplied with and what is added.
  const float* stats = nullptr;
  const float* gain = nullptr;
  const float* shift = nullptr;
};

inline Source dense(const void* data, Type type, int64_t rows, int64_t cols) {
  Source s;
  s.m.data = data;
  s.m.type = type;
  s.m.rows = rows;
  s.m.cols = cols;
  return s;
}

// 64 values of a row through the LayerNorm, in place.
inline void normalise64(const Source& s, int64_t row, int64_t col, float* v) {
  const float mean = s.stats[2 * row], rstd = s.stats[2 * row + 1];
  for (int j = 0; j < 64; j += kWidth) {
    const Floats z = (load<F32>(v + j) - mean) * rstd * load<F32>(s.gain + col + j) + load<F32>(s.shift + col + j);
    store<F32>(v + j, z);
  }
}

// 64 values of a dense matrix as floats.
inline void load64(const void* data, Type type, int64_t i, float* out) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    const auto* from = static_cast<const typename T::Value*>(data) + i;
    for (int j = 0; j < 64; j += kWidth) store<F32>(out + j, load<T>(from + j));
  });
}

// n <= 64 values from (row, col) as floats, zeros up to 64 and outside the matrix.
inline void read64(const Source& s, int64_t row, int64_t col, float* out) {
  const int64_t left = s.m.cols - col;
  const int n = row >= s.m.rows || left <= 0 ? 0 : static_cast<int>(left < 64 ? left : 64);
  if (n == 0) {
    memset(out, 0, 64 * sizeof(float));
    return;
  }
  const int64_t i = row * s.m.cols + col;
  if (s.m.type == Type::nf4) {
    if (n == 64 && i % 64 == 0) decode64(s.m, i, out);
    else decode_any(s.m, i, n, out);
  } else if (n == 64) {
    load64(s.m.data, s.m.type, i, out);
  } else {
    for (int j = 0; j < 64; j += 16)
      load_up_to_16(s.m.data, s.m.type, i + j, n - j < 0 ? 0 : n - j < 16 ? n - j : 16, out + j);
  }
  if (s.stats != nullptr) {
    normalise64(s, row, col, out);
    for (int j = n; j < 64; ++j) out[j] = 0.0f;
  }
  if (s.dropout.on) {
    const uint32_t key = s.dropout.row_key(row);
    for (int j = 0; j < n; ++j) out[j] = s.dropout.keep(key, col + j) ? out[j] : 0.0f;
  }
}

// Whether a matrix is read as it lies.
inline bool as_it_lies(const Source& s) { return s.m.type != Type::nf4 && !s.dropout.on && s.stats == nullptr; }

// The groups of 16, by fours, of at most `most` that lie whole in the matrix from (row, col) on: as floats, one every
// `stride` words. Their number.
inline int64_t copy_sixteens(const Source& s, int64_t row, int64_t col, int64_t most, uint32_t* out, int64_t stride) {
  if (row >= s.m.rows || !as_it_lies(s)) return 0;
  const int64_t left = s.m.cols <= col ? 0 : (s.m.cols - col) / 16, count = (left < most ? left : most) / 4 * 4;
  with_type(s.m.type, [&](auto t) {
    using T = decltype(t);
    const auto* from = static_cast<const typename T::Value*>(s.m.data) + row * s.m.cols + col;
    for (int64_t q = 0; q < count; ++q)
      for (int j = 0; j < 16; j += kWidth)
        store<F32>(reinterpret_cast<float*>(out + q * stride) + j, load<T>(from + 16 * q + j));
  });
  return count;
}

#if PE_LEVEL >= 2
// kAbsmaxCode[index], by lookups in pairs of registers and the upper bits. By a gather a row of 576x576 takes 5 % longer.
PE_INLINE __m512 absmax_code(__m512i index) {
  __m512 of[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    of[i] = _mm512_permutex2var_ps(_mm512_loadu_ps(kAbsmaxCode + 32 * i), index,
                                   _mm512_loadu_ps(kAbsmaxCode + 32 * i + 16));
  const __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32)),
                  bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64)),
                  bit7 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) of[i] = _mm512_mask_mov_ps(of[2 * i], bit5, of[2 * i + 1]);
  of[0] = _mm512_mask_mov_ps(of[0], bit6, of[1]);
  of[1] = _mm512_mask_mov_ps(of[2], bit6, of[3]);
  return _mm512_mask_mov_ps(of[0], bit7, of[1]);
}
#endif

// Scales of `blocks` blocks of 64 from value i (a multiple of 64) of an NF4 matrix.
inline void read_scales(const Matrix& w, int64_t i, int64_t blocks, float* out) {
  const int64_t first = i >> 6;
  if (w.block_shift != 6 || w.absmax_index == nullptr) {
    for (int64_t b = 0; b < blocks; ++b) out[b] = w.scale((first + b) >> (w.block_shift - 6));
    return;
  }
#if PE_LEVEL >= 2
  const __m512 offset = _mm512_set1_ps(w.offset);
#endif
  for (int64_t b = 0, end; b < blocks; b = end) {
    const int64_t from = first + b, group = from >> 8;  // 256 share a nested scale
    end = ((group + 1) << 8) - first < blocks ? ((group + 1) << 8) - first : blocks;
#if PE_LEVEL >= 2
    const __m512 nested = _mm512_set1_ps(w.nested_absmax[group]);
    for (; b < end; b += 16) {
      const __mmask16 mask = end - b < 16 ? static_cast<__mmask16>((1u << (end - b)) - 1) : 0xFFFF;
      const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w.absmax_index + first + b));
      const __m512 code = absmax_code(index);
      _mm512_mask_storeu_ps(out + b, mask, _mm512_add_ps(_mm512_mul_ps(code, nested), offset));
    }
#else
    const float nested = w.nested_absmax[group];
    for (; b < end; ++b) out[b] = kAbsmaxCode[w.absmax_index[first + b]] * nested + w.offset;
#endif
  }
}

#if PE_LEVEL >= 3
// read64 as bf16, two registers.
inline void read64_bf16(const Source& s, int64_t row, int64_t col, __m512i* first, __m512i* second) {
  if (s.m.type == Type::bf16 && !s.dropout.on && s.stats == nullptr && row < s.m.rows && col + 64 <= s.m.cols) {
    const uint16_t* from = static_cast<const uint16_t*>(s.m.data) + row * s.m.cols + col;
    *first = _mm512_loadu_si512(from);
    *second = _mm512_loadu_si512(from + 32);
    return;
  }
  float v[64];
  read64(s, row, col, v);
  *first = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(v + 16), _mm512_loadu_ps(v));
  *second = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(v + 48), _mm512_loadu_ps(v + 32));
}

// Every fourth of 64 values, from the f-th on and from the s-th on: where they lie in two registers.
PE_INLINE __m512i fourths(int f, int s) {
  alignas(64) uint16_t at[32];
  for (int i = 0; i < 16; ++i) {
    at[i] = static_cast<uint16_t>(4 * i + f);
    at[16 + i] = static_cast<uint16_t>(4 * i + s);
  }
  return _mm512_load_si512(at);
}

// 128 natural bf16 values in four registers to the interleaved order: index q of a word is value 1, 0, 3, 2 of its four.
PE_INLINE void interleave128(__m512i v[4]) {
  const __m512i first = fourths(1, 0), second = fourths(3, 2);
  const __m512i a = _mm512_permutex2var_epi16(v[0], first, v[1]), b = _mm512_permutex2var_epi16(v[2], first, v[3]);
  const __m512i c = _mm512_permutex2var_epi16(v[0], second, v[1]), d = _mm512_permutex2var_epi16(v[2], second, v[3]);
  v[0] = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
  v[1] = _mm512_shuffle_i64x2(a, b, 0xEE);
  v[2] = _mm512_inserti64x4(c, _mm512_castsi512_si256(d), 1);
  v[3] = _mm512_shuffle_i64x2(c, d, 0xEE);
}

// 128 NF4 values, interleaved, as bf16; the second 64 are zeros when only one block is left.
PE_INLINE void decode128(const uint8_t* packed, const float* scale, bool whole, __m512i out[4]) {
  const __m512i lane_bit = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512 code = _mm512_loadu_ps(kNf4Code);
  const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(code, _mm512_set1_ps(whole ? scale[1] : 0.0f)),
                                                     _mm512_mul_ps(code, _mm512_set1_ps(scale[0])));
  const __m512i words = whole ? _mm512_loadu_si512(packed)
                              : _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
  // (words & nibble) | lane_bit
  out[0] = _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(words, nibble, lane_bit, 0xEA), table);
  out[1] =
      _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), nibble, lane_bit, 0xEA), table);
  out[2] =
      _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 8), nibble, lane_bit, 0xEA), table);
  out[3] =
      _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 12), nibble, lane_bit, 0xEA), table);
}
#endif

template <bool kPairs>
constexpr int kStep = kPairs ? 32 : 16;  // values of the contraction in a step

// Steps for `n` values, taken 64 at a time. Interleaved are 128 together: of 64 that are left the tile unit takes 128 too,
// half of them zeros, the others take them as they lie.
template <bool kPairs>
inline int64_t steps_for(int64_t n, bool interleaved) {
  const int64_t whole = interleaved && PE_LEVEL >= 4 ? 128 : 64;
  return (n + whole - 1) / whole * whole / kStep<kPairs>;
}

template <bool kPairs>
inline bool can_interleave(const Matrix& w) {
  return kPairs && w.type == Type::nf4 && w.cols % 64 == 0;
}

#if PE_LEVEL >= 3
// A dense row is read in pieces of a block, and each begins where no processor looks ahead by itself.
constexpr int64_t kLeftRowsAhead = 2;

// A row of a left operand of pairs, from `col` on; its steps are kTile words apart.
template <bool kInterleaved>
inline void left_row(const Source& s, int64_t row, int64_t col, int64_t steps, uint32_t* to) {
  if (!kInterleaved && s.m.type == Type::bf16 && as_it_lies(s) && row < s.m.rows && col + steps * 32 <= s.m.cols) {
    const uint16_t* from = static_cast<const uint16_t*>(s.m.data) + row * s.m.cols + col;
    const uint16_t* ahead = from + kLeftRowsAhead * s.m.cols;
    for (int64_t step = 0; step < steps; ++step) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + step * 32), _MM_HINT_T0);
      _mm512_storeu_si512(to + step * kTile, _mm512_loadu_si512(from + step * 32));
    }
    return;
  }
  for (int64_t step = 0; step < steps; step += kInterleaved ? 4 : 2) {
    __m512i v[4];
    read64_bf16(s, row, col + step * 32, &v[0], &v[1]);
    if (kInterleaved && steps - step >= 4) {
      read64_bf16(s, row, col + step * 32 + 64, &v[2], &v[3]);
      interleave128(v);
      for (int q = 2; q < 4; ++q) _mm512_storeu_si512(to + (step + q) * kTile, v[q]);
    }
    for (int q = 0; q < 2; ++q) _mm512_storeu_si512(to + (step + q) * kTile, v[q]);
  }
}

// `count` rows of an NF4 matrix, interleaved, 16 words apart.
inline void left_rows_of_nf4(const Matrix& w, int64_t row, int64_t count, int64_t col, int64_t steps, uint32_t* to) {
  float scale[kMaxSteps / 2 + 16];
  const int64_t blocks = (w.cols - col < steps * 32 ? w.cols - col : steps * 32) / 64;
  for (int64_t end = row + count; row < end; ++row, to += 16) {
    const int64_t i = row * w.cols + col;
    read_scales(w, i, blocks, scale);
    const uint8_t* packed = static_cast<const uint8_t*>(w.data) + (i >> 1);
    int64_t step = 0;
    for (; step + 4 <= steps; step += 4) {
      const int64_t left = blocks - step / 2;
      __m512i v[4];
      if (left <= 0) v[0] = v[1] = v[2] = v[3] = _mm512_setzero_si512();
      else decode128(packed + step * 16, scale + step / 2, left > 1, v);
      for (int q = 0; q < 4; ++q) _mm512_storeu_si512(to + (step + q) * kTile, v[q]);
    }
    if (step == steps) continue;
    __m512i first, second;
    decode64_half<false>(w, i + step * 32, &first, &second);
    _mm512_storeu_si512(to + step * kTile, first);
    _mm512_storeu_si512(to + (step + 1) * kTile, second);
  }
}
#endif

// Left operand: rows [row0, row0 + 16 tiles) and steps [step0, step0 + steps) of a matrix, the contraction along its rows.
template <bool kPairs>
inline void left_panel(const Source& s, bool interleaved, int64_t row0, int64_t tiles, int64_t step0, int64_t steps,
                       uint32_t* out) {
  const int64_t stride = steps * kTile, col = step0 * kStep<kPairs>;
  for (int64_t r = 0; r < tiles * 16; ++r) {
    const int64_t row = row0 + r;
    uint32_t* to = out + (r / 16) * stride + (r % 16) * 16;
#if PE_LEVEL >= 3
    if constexpr (kPairs) {
      if (interleaved && s.m.type == Type::nf4 && row < s.m.rows) {
        const int64_t left = s.m.rows - row, count = left < 16 - r % 16 ? left : 16 - r % 16;
        left_rows_of_nf4(s.m, row, count, col, steps, to);
        r += count - 1;
      } else if (interleaved) {
        left_row<true>(s, row, col, steps, to);
      } else {
        left_row<false>(s, row, col, steps, to);
      }
      continue;
    }
#endif
    float v[64];
    for (int64_t step = copy_sixteens(s, row, col, steps, to, kTile); step < steps; step += 4) {
      read64(s, row, col + step * 16, v);
      for (int q = 0; q < 4 && step + q < steps; ++q) memcpy(to + (step + q) * kTile, v + 16 * q, 64);
    }
  }
}

// Right operand, transposed: columns of the product are rows [row0, row0 + 16 tiles) of a matrix.
template <bool kPairs>
inline void right_panel_of_rows(const Source& s, bool interleaved, int64_t row0, int64_t tiles, int64_t step0,
                                int64_t steps, uint32_t* out) {
  for (int64_t t = 0; t < tiles; ++t) {
    uint32_t* to = out + t * steps * kTile;
    const int64_t row = row0 + 16 * t;
    if (!kPairs && s.m.type == Type::f32 && as_it_lies(s)) {
      const int64_t rows = s.m.rows - row < 16 ? s.m.rows - row : 16, cols = s.m.cols - 16 * step0;
      const uint32_t* from = static_cast<const uint32_t*>(s.m.data) + row * s.m.cols + 16 * step0;
      int64_t step = 0;
      if (rows == 16)
        for (; step < steps && 16 * step + 16 <= cols; ++step)
          transpose16(from + 16 * step, to + step * kTile, s.m.cols);
      for (; step < steps && rows > 0 && 16 * step < cols; ++step) {
        const int64_t left = cols - 16 * step;
        transpose16<true>(from + 16 * step, to + step * kTile, s.m.cols, rows, left < 16 ? left : 16);
      }
      if (step < steps) memset(to + step * kTile, 0, static_cast<size_t>((steps - step) * kTile) * sizeof(uint32_t));
      continue;
    }
    left_panel<kPairs>(s, interleaved, row, 1, step0, steps, to);
    for (int64_t step = 0; step < steps; ++step) {
      alignas(64) uint32_t tile[kTile];
      memcpy(tile, to + step * kTile, sizeof tile);
      transpose16(tile, to + step * kTile);
    }
  }
}

// A right operand's rows are read in short pieces far apart, where no processor prefetches by itself. 64 rows ahead, not
// 16 and not none: a bottleneck of 4096 bf16 features takes 1 % less time, a bf16 dx = dy W of 127 x 49152 x 576 8 %.
constexpr int64_t kRowsAhead = 64;

// Asks for `count` values of a row, which may lie beyond the end; not of packed ones, whose rows are near each other.
inline void expect(const Source& s, int64_t row, int64_t col, int64_t count) {
  if (s.m.type == Type::nf4) return;
  const int64_t size = s.m.type == Type::f32 ? 4 : 2;
  const char* from = static_cast<const char*>(s.m.data) + (row * s.m.cols + col) * size;
  for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(from + i);
}

// Right operand: columns [col0, col0 + 16 tiles) of a matrix, the contraction down its rows from step0. tiles % 4 == 0.
template <bool kPairs>
inline void right_panel(const Source& s, int64_t col0, int64_t tiles, int64_t step0, int64_t steps, uint32_t* out) {
  const int64_t stride = steps * kTile;
  for (int64_t step = 0; step < steps; ++step) {
    for (int k = 0; k < 16; ++k) {
      uint32_t* to = out + step * kTile + 16 * k;
#if PE_LEVEL >= 3
      if constexpr (kPairs) {
        const int64_t row = (step0 + step) * 32 + 2 * k;
        for (int i = 0; i < 2; ++i) expect(s, row + kRowsAhead + i, col0, 16 * tiles);
        const bool fast = s.m.type == Type::nf4 && s.m.cols % 64 == 0 && row + 1 < s.m.rows;
        for (int64_t t = 0; t < tiles; t += 4) {
          const int64_t col = col0 + 16 * t;
          __m512i a[2], b[2];
          if (fast && col + 64 <= s.m.cols) {
            decode64_half<true>(s.m, row * s.m.cols + col, &a[0], &a[1]);
            decode64_half<true>(s.m, (row + 1) * s.m.cols + col, &b[0], &b[1]);
          } else {
            // The order in which unpacking leaves 16 neighbours together: quarters 0 2 4 6 1 3 5 7 of four values.
            const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
            read64_bf16(s, row, col, &a[0], &a[1]);
            read64_bf16(s, row + 1, col, &b[0], &b[1]);
            for (int i = 0; i < 2; ++i) {
              a[i] = _mm512_permutexvar_epi64(order, a[i]);
              b[i] = _mm512_permutexvar_epi64(order, b[i]);
            }
          }
          for (int i = 0; i < 2; ++i) {
            _mm512_storeu_si512(to + (t + 2 * i) * stride, _mm512_unpacklo_epi16(a[i], b[i]));
            _mm512_storeu_si512(to + (t + 2 * i + 1) * stride, _mm512_unpackhi_epi16(a[i], b[i]));
          }
        }
        continue;
      }
#endif
      float v[64];
      const int64_t row = (step0 + step) * 16 + k;
      expect(s, row + kRowsAhead, col0, 16 * tiles);
      for (int64_t t = copy_sixteens(s, row, col0, tiles, to, stride); t < tiles; t += 4) {
        read64(s, row, col0 + 16 * t, v);
        for (int q = 0; q < 4; ++q) memcpy(to + (t + q) * stride, v + 16 * q, 64);
      }
    }
  }
}
