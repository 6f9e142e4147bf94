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

inline float sum_of_lanes(Floats v) {
#if PE_LEVEL >= 2
  return _mm512_reduce_add_ps((__m512)v);
#elif PE_LEVEL == 1
  const __m128 fours = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
  return _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// Adds the adapter and the bias to the lanes that sum up to row n of y, for each row of x, and writes them.
template <int kRows>
inline void finish_row(Floats* total, const Matrix& w, int64_t n, const Extra& extra, Type type, void* y) {
  with_type(extra.b.type, [&](auto t) {
    using T = decltype(t);
    const auto* up = static_cast<const typename T::Value*>(extra.b.data) + n * extra.rank;
    for (int64_t r = 0; r < extra.rank; r += kWidth) {
      const Floats of_row = load<T>(up + r, extra.rank - r);
      for (int m = 0; m < kRows; ++m)
        total[m] = multiply_add(of_row, load<F32>(extra.h + m * extra.stride + r), total[m]);
    }
  });
  const float bias = extra.bias == nullptr ? 0.0f : load_one(extra.bias, extra.bias_type, n);
  for (int m = 0; m < kRows; ++m) store_one(y, type, m * w.rows + n, sum_of_lanes(total[m]) + bias);
}

#include "cpu/few_rows_nf4.inl"

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

// Rows [n0, n1) of a dense W for kRows rows of x: floats, each `stride` long, zeros beyond K.
template <class T, int kRows>
inline void few_rows_dense(const float* x, int64_t stride, const Matrix& w, int64_t n0, int64_t n1, const Extra& extra,
                           Type type, void* y) {
  const int64_t k = w.cols, whole = k - k % (2 * kWidth);
  for (int64_t n = n0; n < n1; ++n) {
    const auto* from = static_cast<const typename T::Value*>(w.data) + n * k;
    Floats total[kRows] = {}, second[kRows] = {};
    for (int64_t c = 0; c < whole; c += 2 * kWidth) {
      // the processor's own prefetch stops at each page
      for (int64_t i = 0; i < 2 * kWidth; i += 64 / static_cast<int64_t>(sizeof(*from)))
        __builtin_prefetch(from + c + i + 4096 / sizeof(*from));
      const Floats v = load<T>(from + c), next = load<T>(from + c + kWidth);
      for (int m = 0; m < kRows; ++m) {
        total[m] = multiply_add(v, load<F32>(x + m * stride + c), total[m]);
        second[m] = multiply_add(next, load<F32>(x + m * stride + c + kWidth), second[m]);
      }
    }
    for (int64_t c = whole; c < k; c += kWidth) {
      const Floats v = load<T>(from + c, k - c);
      for (int m = 0; m < kRows; ++m) total[m] = multiply_add(v, load<F32>(x + m * stride + c), total[m]);
    }
    for (int m = 0; m < kRows; ++m) total[m] += second[m];
    finish_row<kRows>(total, w, n, extra, type, y);
  }
}

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
// 5650, 16 rows 176 / 171 and 6540 / 5650; in bf16 the same; dense bf16 and float32, 8 rows of
// 4096x4096 with r=16, least ms beside other work: 3.9 / 10.5 and 4.9 / 9.9.
template <bool kPairs>
inline int64_t most_few_rows(const Matrix& w) {
#if PE_LEVEL >= 1
  if (in_blocks(w) && !(kPairs && PE_LEVEL >= 4)) return kPairs && w.rows * w.cols < (1 << 19) ? 8 : 12;
#endif
  return PE_LEVEL == 1 && w.type != Type::nf4 ? 8 : 4;
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
  if (w.m.type == Type::nf4) {
    few_rows_f32<kRows>(from, stride, w, n0, n1, extra, type, y);
    return;
  }
  with_type(w.m.type, [&](auto t) { few_rows_dense<decltype(t), kRows>(from, stride, w.m, n0, n1, extra, type, y); });
}

// The same for `rows` <= kRowsAtOnce.
inline void few_rows(const void* x, int64_t stride, Take take, int rows, const Source& w, int64_t n0, int64_t n1,
                     const Extra& extra, Type type, void* y) {
  if (rows == 1) few_rows<1>(x, stride, take, w, n0, n1, extra, type, y);
  else if (rows == 2) few_rows<2>(x, stride, take, w, n0, n1, extra, type, y);
  else if (rows == 3) few_rows<3>(x, stride, take, w, n0, n1, extra, type, y);
  else few_rows<4>(x, stride, take, w, n0, n1, extra, type, y);
}
