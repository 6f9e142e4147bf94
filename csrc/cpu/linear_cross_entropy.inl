// Cross entropy of rows of logits, and its gradient in place of them. Included once per instruction set.
//
//   m = max_j l_j    s = sum_j exp(l_j - m)    loss = log s - (l_label - m)    dl_j = scale (exp(l_j - m) / s - [j =
//   label])
//
// A row of 49,152 bf16 logits is 96 KiB and stays in L2 between its three passes (max, sum, gradient), so exp is
// computed twice rather than kept in float: 25 million of them a 512-row step, a fraction of the products around.
// The arithmetic is written once, over GCC's generic vectors of 16 floats, which become one, two or four registers.
#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors as results: every function that returns one is inlined

#include "cpu/convert.inl"

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));

PE_INLINE F16 broadcast(float v) { return F16{} + v; }

template <Type type>
PE_INLINE F16 load16(const void* data, int64_t i) {
  F16 v;
  if constexpr (type == Type::f32) {
    memcpy(&v, static_cast<const float*>(data) + i, 64);
  } else if constexpr (type == Type::bf16) {
    H16 half;
    memcpy(&half, static_cast<const uint16_t*>(data) + i, 32);
    v = (F16)(__builtin_convertvector(half, U16) << 16);
  } else {
    const uint16_t* half = static_cast<const uint16_t*>(data) + i;
#if PE_LEVEL >= 2
    v = (F16)_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
#else
    for (int j = 0; j < 16; ++j) v[j] = f16_to_float(half[j]);
#endif
  }
  return v;
}

template <Type type>
PE_INLINE void store16(void* data, int64_t i, const F16& v) {
  if constexpr (type == Type::f32) {
    memcpy(static_cast<float*>(data) + i, &v, 64);
  } else if constexpr (type == Type::bf16) {
#if PE_LEVEL >= 3
    const H16 half = (H16)_mm512_cvtneps_pbh((__m512)v);
#else
    const U16 bits = (U16)v;
    const U16 rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const H16 half = __builtin_convertvector(v != v ? U16{} + 0x7FC0 : rounded, H16);
#endif
    memcpy(static_cast<uint16_t*>(data) + i, &half, 32);
  } else {
    uint16_t* half = static_cast<uint16_t*>(data) + i;
#if PE_LEVEL >= 2
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(half),
                        _mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int j = 0; j < 16; ++j) half[j] = float_to_f16(v[j]);
#endif
  }
}

// The last n < 16 values of a row, filled up with `fill`.
template <Type type>
PE_INLINE F16 load_tail(const void* data, int64_t i, int n, float fill) {
  F16 v = broadcast(fill);
  for (int j = 0; j < n; ++j) v[j] = load_one(data, type, i + j);
  return v;
}

// exp(x) for x <= 0 (and NaN), to about one unit in the last place: 2^n e^r with |r| <= ln 2 / 2, e^r by the polynomial
// of Cephes' expf. What would be subnormal, below -87.3, is 0.
PE_INLINE F16 exp_nonpositive(const F16& x) {
  const F16 shifter = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const F16 shifted = x * 1.44269504088896341f + shifter;
  const F16 n = shifted - shifter;
  F16 r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F16 p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const F16 power = (F16)(((I16)shifted + 127) << 23);
  return x < -87.3f ? F16{} : p * power;
}

struct RowStats {
  float max;
  double sum;
};

template <Type type>
RowStats row_stats(const void* row, int64_t n) {
  const int64_t full = n & ~int64_t{15};
  const int rest = static_cast<int>(n - full);
  // Four chains each, so that the latency of a compare or an addition does not bound the loop. A NaN need not survive
  // the maximum: it comes back in the sum.
  F16 m[4];
  for (F16& v : m) v = broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + 64 <= full; i += 64) {
    for (int c = 0; c < 4; ++c) {
      const F16 v = load16<type>(row, i + 16 * c);
      m[c] = v > m[c] ? v : m[c];
    }
  }
  for (; i < full; i += 16) {
    const F16 v = load16<type>(row, i);
    m[0] = v > m[0] ? v : m[0];
  }
  if (rest) {
    const F16 v = load_tail<type>(row, full, rest, -INFINITY);
    m[0] = v > m[0] ? v : m[0];
  }
  float max = -INFINITY;
  for (const F16& v : m)
    for (int j = 0; j < 16; ++j) max = v[j] > max ? v[j] : max;

  F16 s[4] = {};
  for (i = 0; i + 64 <= full; i += 64)
    for (int c = 0; c < 4; ++c) s[c] += exp_nonpositive(load16<type>(row, i + 16 * c) - max);
  for (; i < full; i += 16) s[0] += exp_nonpositive(load16<type>(row, i) - max);
  if (rest) {
    const F16 e = exp_nonpositive(load_tail<type>(row, full, rest, -INFINITY) - max);
    for (int j = 0; j < rest; ++j) s[1][j] += e[j];
  }
  double sum = 0.0;
  for (const F16& v : s)
    for (int j = 0; j < 16; ++j) sum += v[j];
  return {max, sum};
}

// columns first .. first + n of the row's gradient; label counts from the first.
template <Type type>
void row_gradient(void* row, int64_t n, int64_t label, RowStats stats, float scale) {
  const int64_t full = n & ~int64_t{15};
  const int rest = static_cast<int>(n - full);
  const bool here = label >= 0 && label < n;
  const float factor = static_cast<float>(scale / stats.sum);
  float at_label = 0.0f;
  if (here) {  // before the row is overwritten
    const double p = std::exp(static_cast<double>(load_one(row, type, label)) - stats.max) / stats.sum;
    at_label = static_cast<float>((p - 1.0) * scale);
  }
  for (int64_t i = 0; i < full; i += 16)
    store16<type>(row, i, exp_nonpositive(load16<type>(row, i) - stats.max) * factor);
  if (rest) {
    const F16 g = exp_nonpositive(load_tail<type>(row, full, rest, -INFINITY) - stats.max) * factor;
    for (int j = 0; j < rest; ++j) store_one(row, type, full + j, g[j]);
  }
  if (here) store_one(row, type, label, at_label);
}

template <Type type>
void rows_loss(const Logits& l, int64_t begin, int64_t end, float* loss, float* stats, bool write_gradient) {
  for (int64_t r = begin; r < end; ++r) {
    char* row = l.row(r);
    const RowStats s = row_stats<type>(row, l.cols);
    stats[2 * r] = s.max;
    stats[2 * r + 1] = static_cast<float>(s.sum);
    loss[r] = static_cast<float>(std::log(s.sum) - (static_cast<double>(load_one(row, type, l.labels[r])) - s.max));
    if (write_gradient) row_gradient<type>(row, l.cols, l.labels[r], s, l.scale[r]);
  }
}

template <Type type>
void rows_gradient(const Logits& l, int64_t begin, int64_t end, const float* stats) {
  for (int64_t r = begin; r < end; ++r)
    row_gradient<type>(l.row(r), l.cols, l.labels[r] - l.first_column, {stats[2 * r], stats[2 * r + 1]}, l.scale[r]);
}

void cross_entropy_loss(const Logits& l, int64_t begin, int64_t end, float* loss, float* stats, bool write_gradient) {
  switch (l.type) {
    case Type::f32:
      return rows_loss<Type::f32>(l, begin, end, loss, stats, write_gradient);
    case Type::bf16:
      return rows_loss<Type::bf16>(l, begin, end, loss, stats, write_gradient);
    default:
      return rows_loss<Type::f16>(l, begin, end, loss, stats, write_gradient);
  }
}

void cross_entropy_gradient(const Logits& l, int64_t begin, int64_t end, const float* stats) {
  switch (l.type) {
    case Type::f32:
      return rows_gradient<Type::f32>(l, begin, end, stats);
    case Type::bf16:
      return rows_gradient<Type::bf16>(l, begin, end, stats);
    default:
      return rows_gradient<Type::f16>(l, begin, end, stats);
  }
}
