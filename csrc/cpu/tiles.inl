// Products of 16 x 16 tiles of 32-bit words. Included once per instruction set.
//
// A word is one float, or (kPairs, AVX512-BF16 and AMX) two bf16 neighbours in the contraction. A tile of the left
// operand holds 16 rows of 16 words along the contraction (a "step"); one of the right operand 16 words along the
// contraction, each for 16 columns. Tiles are 1 KiB, contiguous, step after step: the layout AMX loads, and the one
// from which the vector units broadcast. The result is 16 x 16 floats.

constexpr int kTile = 256;         // words in a tile
constexpr int64_t kMaxSteps = 64;  // the most steps a panel holds

// Rows of `in` are `stride` words apart. kPart: only the first `rows` and `cols` of them are there, the rest is zero.
template <bool kPart = false>
inline void transpose16(const uint32_t* in, uint32_t* out, int64_t stride = 16, int64_t rows = 16, int64_t cols = 16) {
#if PE_LEVEL >= 2
  __m512i r[16], t[16];
  const __mmask16 there = static_cast<__mmask16>((1u << cols) - 1);
  for (int i = 0; i < 16; ++i) {
    if constexpr (kPart) r[i] = _mm512_maskz_loadu_epi32(i < rows ? there : 0, in + stride * (i < rows ? i : 0));
    else r[i] = _mm512_loadu_si512(in + stride * i);
  }
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4g + c] holds, in its lane l, column 4l + c of rows 4g .. 4g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i lo01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), hi01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xDD);
    const __m512i lo23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88),
                  hi23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xDD);
    _mm512_storeu_si512(out + 16 * c, _mm512_shuffle_i32x4(lo01, lo23, 0x88));
    _mm512_storeu_si512(out + 16 * (4 + c), _mm512_shuffle_i32x4(hi01, hi23, 0x88));
    _mm512_storeu_si512(out + 16 * (8 + c), _mm512_shuffle_i32x4(lo01, lo23, 0xDD));
    _mm512_storeu_si512(out + 16 * (12 + c), _mm512_shuffle_i32x4(hi01, hi23, 0xDD));
  }
#else
  alignas(64) uint32_t whole[kTile];
  if constexpr (kPart) {
    memset(whole, 0, sizeof whole);
    for (int64_t i = 0; i < rows; ++i) memcpy(whole + 16 * i, in + stride * i, static_cast<size_t>(cols) * 4);
    in = whole;
    stride = 16;
  }
#endif
#if PE_LEVEL == 1
  // Quarters of 8 x 8.
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int row = quarter / 2 * 8, col = quarter % 2 * 8;
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(in) + stride * (row + i) + col);
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
      r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
    }
    // r[4g + c] holds, in its lane l, column 4l + c of rows 4g .. 4g + 3.
    float* to = reinterpret_cast<float*>(out) + 16 * col + row;
    for (int c = 0; c < 4; ++c) {
      _mm256_storeu_ps(to + 16 * c, _mm256_permute2f128_ps(r[c], r[4 + c], 0x20));
      _mm256_storeu_ps(to + 16 * (4 + c), _mm256_permute2f128_ps(r[c], r[4 + c], 0x31));
    }
  }
#elif PE_LEVEL == 0
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[16 * j + i] = in[stride * i + j];
#endif
}

#if PE_LEVEL >= 4
// Tile registers: 0-3 accumulate; the shape of all eight is set once per parallel region.
struct TileUnit {
  TileUnit() {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;  // bytes in a row
      config[48 + t] = 16;      // rows
    }
    _tile_loadconfig(config);
  }
  ~TileUnit() { _tile_release(); }
};

// GCC takes a tile register's number from the letters of the call, hence the branches.
// kOnce: the tile is read once, and is kept from the L1 cache, where the other operand stays.
template <int kRegister, bool kOnce>
PE_INLINE void load_tile(const uint32_t* from) {
  if constexpr (kRegister == 4 && kOnce) _tile_stream_loadd(4, from, 64);
  if constexpr (kRegister == 5 && kOnce) _tile_stream_loadd(5, from, 64);
  if constexpr (kRegister == 6 && kOnce) _tile_stream_loadd(6, from, 64);
  if constexpr (kRegister == 7 && kOnce) _tile_stream_loadd(7, from, 64);
  if constexpr (kRegister == 4 && !kOnce) _tile_loadd(4, from, 64);
  if constexpr (kRegister == 5 && !kOnce) _tile_loadd(5, from, 64);
  if constexpr (kRegister == 6 && !kOnce) _tile_loadd(6, from, 64);
  if constexpr (kRegister == 7 && !kOnce) _tile_loadd(7, from, 64);
}

// Adds the product of a tile of A and kCols tiles of B to sums kSum, kSum + 1, .. (at most register 3).
template <int kSum, int kCols>
PE_INLINE void multiply_tile(const uint32_t* a, const uint32_t* b, int64_t b_stride) {
  if constexpr (kSum % 2 == 0) load_tile<4, false>(a);
  else load_tile<5, false>(a);
  load_tile<6, false>(b);
  if constexpr (kSum == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (kSum == 1) _tile_dpbf16ps(1, 5, 6);
  if constexpr (kSum == 2) _tile_dpbf16ps(2, 4, 6);
  if constexpr (kSum == 3) _tile_dpbf16ps(3, 5, 6);
  if constexpr (kCols > 1) {
    load_tile<7, false>(b + b_stride);
    if constexpr (kSum == 0) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kSum == 2) _tile_dpbf16ps(3, 4, 7);
  }
  if constexpr (kCols > 2) {
    load_tile<6, false>(b + 2 * b_stride);
    _tile_dpbf16ps(2, 4, 6);
  }
  if constexpr (kCols > 3) {
    load_tile<7, false>(b + 3 * b_stride);
    _tile_dpbf16ps(3, 4, 7);
  }
}

template <int kRows, int kCols, bool kLeftOnce>
inline void amx_multiply(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t steps,
                         float* c, int64_t c_stride) {
  _tile_loadd(0, c, 64);
  if constexpr (kCols > 1) _tile_loadd(1, c + kTile, 64);
  if constexpr (kRows > 1) _tile_loadd(2, c + c_stride, 64);
  if constexpr (kRows > 1 && kCols > 1) _tile_loadd(3, c + c_stride + kTile, 64);
  for (int64_t s = 0; s < steps; ++s) {
    const uint32_t *as = a + s * kTile, *bs = b + s * kTile;
    load_tile<6, !kLeftOnce>(bs);
    load_tile<4, kLeftOnce>(as);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kCols > 1) {
      load_tile<7, !kLeftOnce>(bs + b_stride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows > 1) {
      load_tile<5, kLeftOnce>(as + a_stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kRows > 1 && kCols > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  if constexpr (kCols > 1) _tile_stored(1, c + kTile, 64);
  if constexpr (kRows > 1) _tile_stored(2, c + c_stride, 64);
  if constexpr (kRows > 1 && kCols > 1) _tile_stored(3, c + c_stride + kTile, 64);
}

// Four left tiles against one right tile: four sums in flight where there is a single column of tiles.
inline void amx_multiply_4x1(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t steps, float* c,
                             int64_t c_stride) {
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + c_stride, 64);
  _tile_loadd(2, c + 2 * c_stride, 64);
  _tile_loadd(3, c + 3 * c_stride, 64);
  for (int64_t s = 0; s < steps; ++s) {
    const uint32_t* as = a + s * kTile;
    _tile_loadd(7, b + s * kTile, 64);
    _tile_loadd(4, as, 64);
    _tile_dpbf16ps(0, 4, 7);
    _tile_loadd(5, as + a_stride, 64);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(6, as + 2 * a_stride, 64);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(4, as + 3 * a_stride, 64);
    _tile_dpbf16ps(3, 4, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + c_stride, 64);
  _tile_stored(2, c + 2 * c_stride, 64);
  _tile_stored(3, c + 3 * c_stride, 64);
}
#else
struct TileUnit {
  TileUnit() {}
};
#endif

// Steps summed on their own before they join the result: short sums lose less to rounding than one long one. 64 floats,
// 128 values of bf16; half of those cost 3 % more time.
constexpr int64_t kSumSteps = 4;

#if PE_LEVEL >= 2
// kRows rows, `row` words apart, of a tile (steps kNext words apart) against kCols tiles of columns. Eight rows of two
// tiles fill the registers; two serve who has no more.
template <bool kPairs, int kRows, int kCols, int64_t kNext>
PE_INLINE void multiply_rows(const uint32_t* a, int64_t row, const uint32_t* b, int64_t b_stride, int64_t steps,
                             float* c, bool fresh) {
  __m512 sum[kRows][kCols];
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kCols; ++j) sum[r][j] = _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s) {
    const uint32_t *as = a + s * kNext, *bs = b + s * kTile;
    for (int k = 0; k < 16; ++k) {
      __m512i right[kCols];
      for (int j = 0; j < kCols; ++j) right[j] = _mm512_loadu_si512(bs + j * b_stride + 16 * k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i left = _mm512_set1_epi32(static_cast<int>(as[row * r + k]));
        for (int j = 0; j < kCols; ++j) {
#if PE_LEVEL >= 3
          if constexpr (kPairs) {
            sum[r][j] = _mm512_dpbf16_ps(sum[r][j], (__m512bh)left, (__m512bh)right[j]);
            continue;
          }
#endif
          sum[r][j] = _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right[j]), sum[r][j]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kCols; ++j) {
      float* to = c + j * kTile + 16 * r;
      _mm512_storeu_ps(to, fresh ? sum[r][j] : _mm512_add_ps(_mm512_loadu_ps(to), sum[r][j]));
    }
}
#elif PE_LEVEL == 1
// kRows rows, `row` floats apart, of a tile (steps kNext floats apart) against a tile of columns. Six rows fill the
// registers; less than eight sums in flight wait for each other.
template <int kRows, int64_t kNext>
PE_INLINE void multiply_rows(const float* a, int64_t row, const float* b, int64_t steps, float* c, bool fresh) {
  __m256 low[kRows], high[kRows];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) low[r] = high[r] = _mm256_setzero_ps();
  for (int64_t s = 0; s < steps; ++s) {
    const float *as = a + s * kNext, *bs = b + s * kTile;
    for (int k = 0; k < 16; ++k) {
      const __m256 right_low = _mm256_loadu_ps(bs + 16 * k), right_high = _mm256_loadu_ps(bs + 16 * k + 8);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m256 left = _mm256_broadcast_ss(as + row * r + k);
        low[r] = _mm256_fmadd_ps(left, right_low, low[r]);
        high[r] = _mm256_fmadd_ps(left, right_high, high[r]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    float* to = c + 16 * r;
    _mm256_storeu_ps(to, fresh ? low[r] : _mm256_add_ps(_mm256_loadu_ps(to), low[r]));
    _mm256_storeu_ps(to + 8, fresh ? high[r] : _mm256_add_ps(_mm256_loadu_ps(to + 8), high[r]));
  }
}
#endif

// One tile, of which the first `used` rows count, against kCols (1 or 2) tiles of columns, at most kSumSteps steps.
// kInPlace: the left operand is no tile but rows that lie `row` words apart, whose steps follow on each other.
template <bool kPairs, int kCols, bool kInPlace>
inline void vector_multiply(const uint32_t* a, int64_t row, const uint32_t* b, int64_t b_stride, int64_t steps,
                            float* c, int64_t used, bool fresh) {
  constexpr int64_t kNext = kInPlace ? 16 : kTile;
  if constexpr (!kInPlace) row = 16;
#if PE_LEVEL >= 2
  for (int64_t r = 0; r < used; r += 8) {
    const uint32_t* from = a + row * r;
    if (used - r > 2) multiply_rows<kPairs, 8, kCols, kNext>(from, row, b, b_stride, steps, c + 16 * r, fresh);
    else multiply_rows<kPairs, 2, kCols, kNext>(from, row, b, b_stride, steps, c + 16 * r, fresh);
  }
#elif PE_LEVEL == 1
  const float *af = reinterpret_cast<const float*>(a), *bf = reinterpret_cast<const float*>(b);
  for (int j = 0; j < kCols; ++j) {
    const float* right = bf + j * b_stride;
    float* to = c + j * kTile;
    if (used == 16) {
      multiply_rows<6, kNext>(af, row, right, steps, to, fresh);
      multiply_rows<5, kNext>(af + 6 * row, row, right, steps, to + 6 * 16, fresh);
      multiply_rows<5, kNext>(af + 11 * row, row, right, steps, to + 11 * 16, fresh);
      continue;
    }
    for (int r = 0; r < used; r += 4) multiply_rows<4, kNext>(af + r * row, row, right, steps, to + 16 * r, fresh);
  }
#else
  const float *af = reinterpret_cast<const float*>(a), *bf = reinterpret_cast<const float*>(b);
  for (int j = 0; j < kCols; ++j) {
    for (int r = 0; r < used; ++r) {
      float sum[16] = {};
      for (int64_t s = 0; s < steps; ++s) {
        const float *as = af + s * kNext + row * r, *bs = bf + s * kTile + j * b_stride;
        for (int k = 0; k < 16; ++k)
          for (int i = 0; i < 16; ++i) sum[i] += as[k] * bs[16 * k + i];
      }
      for (int i = 0; i < 16; ++i) {
        float& to = c[j * kTile + 16 * r + i];
        to = fresh ? sum[i] : to + sum[i];
      }
    }
  }
#endif
}

// C += A B over `steps`: rows tiles of A, cols tiles of B, C tile (r, j) at c + r * c_stride + j * kTile. Strides in words.
// kLeftOnce: the right operand stays in the L1 cache, else the left one. Of the last tile of A, the first `last_used`
// rows count. fresh: C = A B; the tiles of C are then side by side, c_stride = cols * kTile, and all of them written but
// the rows that do not count. kInPlace, for words of one float: A is no tiles but whole sixteens of rows, `a_stride` words
// apart.
template <bool kPairs, bool kLeftOnce, bool kInPlace = false>
inline void multiply(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t b_stride,
                     int64_t cols, int64_t steps, float* c, int64_t c_stride, int64_t last_used = 16,
                     bool fresh = false) {
#if PE_LEVEL >= 4
  if constexpr (kPairs) {
    if (fresh) memset(c, 0, static_cast<size_t>(rows * cols * kTile) * sizeof(float));
    int64_t j = 0;
    for (; j + 2 <= cols; j += 2) {
      int64_t r = 0;
      for (; r + 2 <= rows; r += 2)
        amx_multiply<2, 2, kLeftOnce>(a + r * a_stride, a_stride, b + j * b_stride, b_stride, steps,
                                      c + r * c_stride + j * kTile, c_stride);
      if (r < rows)
        amx_multiply<1, 2, kLeftOnce>(a + r * a_stride, a_stride, b + j * b_stride, b_stride, steps,
                                      c + r * c_stride + j * kTile, c_stride);
    }
    if (j < cols) {
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4)
        amx_multiply_4x1(a + r * a_stride, a_stride, b + j * b_stride, steps, c + r * c_stride + j * kTile, c_stride);
      for (; r + 2 <= rows; r += 2)
        amx_multiply<2, 1, kLeftOnce>(a + r * a_stride, a_stride, b + j * b_stride, b_stride, steps,
                                      c + r * c_stride + j * kTile, c_stride);
      if (r < rows)
        amx_multiply<1, 1, kLeftOnce>(a + r * a_stride, a_stride, b + j * b_stride, b_stride, steps,
                                      c + r * c_stride + j * kTile, c_stride);
    }
    return;
  }
#endif
  for (int64_t j = 0; j < cols; j += 2) {
    for (int64_t r = 0; r < rows; ++r) {
      float* to = c + r * c_stride + j * kTile;
      const int64_t used = r + 1 < rows ? 16 : last_used;
      for (int64_t s = 0; s < steps; s += kSumSteps) {
        const int64_t n = steps - s < kSumSteps ? steps - s : kSumSteps;
        const uint32_t* left = kInPlace ? a + 16 * (r * a_stride + s) : a + r * a_stride + s * kTile;
        const uint32_t* right = b + j * b_stride + s * kTile;
        if (j + 2 <= cols)
          vector_multiply<kPairs, 2, kInPlace>(left, a_stride, right, b_stride, n, to, used, fresh && s == 0);
        else vector_multiply<kPairs, 1, kInPlace>(left, a_stride, right, b_stride, n, to, used, fresh && s == 0);
      }
    }
  }
}
