// y = x W^T for a few rows of x: the packed weight is read once and decoded in registers. Included once per instruction
// set. Floor: the packed bytes over the memory bandwidth.

constexpr int kRowsAtOnce = 4;  // their sums fit the registers

// The most rows for which this is faster than panels: ms at 4096 x 4096 on one thread, AMX 1.38 by panels against 1.37
// and 1.67 at 3 and 4 rows here; AVX512-BF16 6.5 by panels at any number up to 16 against 0.44 + 0.31 a row here
// (bench/results/cpu-intel-r-xeon-r-processor/lora_linear.csv).
#if PE_LEVEL >= 4
template <bool kPairs>
constexpr int kFewRows = kPairs ? 3 : 12;
#else
template <bool kPairs>
constexpr int kFewRows = 12;
#endif
constexpr int kMostFewRows = 12;

inline float sum16(const float* v) {
  float s = 0.0f;
  for (int i = 0; i < 16; ++i) s += v[i];
  return s;
}

// dot(a, b) of n <= 64 floats.
inline float dot(const float* a, const float* b, int n) {
  float lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i & 15] += a[i] * b[i];
  return sum16(lanes);
}

// The same of exactly 64.
inline float dot64(const float* a, const float* b) {
  float lanes[16] = {};
  for (int i = 0; i < 64; i += 16)
    for (int j = 0; j < 16; ++j) lanes[j] += a[i + j] * b[i + j];
  return sum16(lanes);
}

// What is added to every output: the adapter's s B h and the bias.
struct Extra {
  const float* h = nullptr;  // (rows, rank), scaled
  Source b;                  // (out_features, rank)
  int64_t rank = 0;
  const void* bias = nullptr;
  Type bias_type = Type::f32;
};

// The part of row n of y that is not the base product, for each row of x.
inline void extras(const Extra& extra, int64_t n, int rows, float* out) {
  const float bias = extra.bias == nullptr ? 0.0f : load_one(extra.bias, extra.bias_type, n);
  for (int m = 0; m < rows; ++m) out[m] = bias;
  for (int64_t r = 0; r < extra.rank; r += 64) {
    float b[64];
    read64(extra.b, n, r, b);
    const int count = static_cast<int>(extra.rank - r < 64 ? extra.rank - r : 64);
    for (int m = 0; m < rows; ++m) out[m] += dot(extra.h + m * extra.rank + r, b, count);
  }
}

#if PE_LEVEL >= 3
// x: rows of bf16, each `stride` values long, zeros beyond K, interleaved where the weight is.
template <int kRows, bool kInterleaved>
inline void few_rows_bf16(const uint16_t* x, int64_t stride, const Source& source, int64_t n0, int64_t n1,
                          const Extra& extra, Type type, void* y) {
  const Matrix& w = source.m;
  const int64_t blocks = (w.cols + 63) / 64;
  float* scale = scratch<float>(Slot::few_rows, blocks + 16);
  for (int64_t n = n0; n < n1; ++n) {
    const int64_t i = n * w.cols;
    const uint8_t* packed = static_cast<const uint8_t*>(w.data) + (i >> 1);
    if constexpr (kInterleaved) read_scales(w, i, blocks, scale);
    __m512 sum[kRows][4];  // a dot instruction waits for the one before it on the same sum: four are in flight
    for (int m = 0; m < kRows; ++m)
      for (int q = 0; q < 4; ++q) sum[m][q] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int64_t b = 0; b < blocks; b += 2) {
      __m512i v[4];
      if constexpr (kInterleaved) {
        _mm_prefetch(reinterpret_cast<const char*>(packed + b * 32 + 2048), _MM_HINT_T0);
        decode128(packed + b * 32, scale + b, b + 1 < blocks, v);
      } else {
        read64_bf16(source, n, b * 64, &v[0], &v[1]);
        read64_bf16(source, n, b * 64 + 64, &v[2], &v[3]);
      }
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q)
        for (int m = 0; m < kRows; ++m)
          sum[m][q] = _mm512_dpbf16_ps(sum[m][q], (__m512bh)v[q],
                                       (__m512bh)_mm512_loadu_si512(x + m * stride + b * 64 + q * 32));
    }
    float add[kRows];
    extras(extra, n, kRows, add);
    for (int m = 0; m < kRows; ++m)
      store_one(y, type, m * w.rows + n,
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

// Rows [n0, n1) of W for all of `rows` <= kRowsAtOnce rows of x.
template <bool kPairs>
inline void few_rows(const void* x, int64_t stride, int rows, const Source& w, int64_t n0, int64_t n1,
                     const Extra& extra, Type type, void* y) {
#if PE_LEVEL >= 3
  if constexpr (kPairs) {
    const uint16_t* from = static_cast<const uint16_t*>(x);
    const bool interleaved = can_interleave<kPairs>(w.m);
    const auto run = [&]<int kRows>() {
      if (interleaved) few_rows_bf16<kRows, true>(from, stride, w, n0, n1, extra, type, y);
      else few_rows_bf16<kRows, false>(from, stride, w, n0, n1, extra, type, y);
    };
    if (rows == 1) run.template operator()<1>();
    else if (rows == 2) run.template operator()<2>();
    else if (rows == 3) run.template operator()<3>();
    else run.template operator()<4>();
    return;
  }
#endif
  const float* from = static_cast<const float*>(x);
  if (rows == 1) few_rows_f32<1>(from, stride, w, n0, n1, extra, type, y);
  else if (rows == 2) few_rows_f32<2>(from, stride, w, n0, n1, extra, type, y);
  else if (rows == 3) few_rows_f32<3>(from, stride, w, n0, n1, extra, type, y);
  else few_rows_f32<4>(from, stride, w, n0, n1, extra, type, y);
}
