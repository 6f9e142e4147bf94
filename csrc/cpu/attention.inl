// Attention over intervals of keys, in float with the operands of one key/value head packed once a task. Included once
// per instruction set. The three products of the forward and five of the backward are one small kernel, `product`.
#include "cpu/vector.inl"

#if PE_LEVEL >= 2
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;

// C (ROWS x VECTORS * kWidth) = or += A B. A is read one value at a time, with any strides, so it may be transposed.
template <int ROWS, int VECTORS>
inline void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_stride,
                 float* c, int64_t c_stride, bool add) {
  Floats sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Floats row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) row[v] = load<F32>(b + k * b_stride + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Floats one = all(a[r * a_row + k * a_depth]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += one * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      float* at = c + r * c_stride + v * kWidth;
      // Added last: a sum of block sums has a smaller rounding error than one long chain.
      store<F32>(at, add ? load<F32>(at) + sums[r][v] : sums[r][v]);
    }
}

template <int VECTORS>
inline void tile_rows(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
                      int64_t b_stride, float* c, int64_t c_stride, bool add) {
  switch (rows) {
    case 1:
      return tile<1, VECTORS>(depth, a, a_row, a_depth, b, b_stride, c, c_stride, add);
    case 2:
      return tile<2, VECTORS>(depth, a, a_row, a_depth, b, b_stride, c, c_stride, add);
    case 3:
      return tile<3, VECTORS>(depth, a, a_row, a_depth, b, b_stride, c, c_stride, add);
    case 4:
      return tile<4, VECTORS>(depth, a, a_row, a_depth, b, b_stride, c, c_stride, add);
    case 5:
      return tile<5, VECTORS>(depth, a, a_row, a_depth, b, b_stride, c, c_stride, add);
    default:
      return tile<6, VECTORS>(depth, a, a_row, a_depth, b, b_stride, c, c_stride, add);
  }
}

// C (rows x columns) = or += A (rows x depth) B (depth x columns); columns is a multiple of 16.
inline void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                    const float* b, int64_t b_stride, float* c, int64_t c_stride, bool add) {
  int64_t j = 0;
  for (; j + kTileVectors * kWidth <= columns; j += kTileVectors * kWidth)
    for (int64_t i = 0; i < rows; i += kTileRows)
      tile_rows<kTileVectors>(rows - i < kTileRows ? rows - i : kTileRows, depth, a + i * a_row, a_row, a_depth, b + j,
                              b_stride, c + i * c_stride + j, c_stride, add);
  for (; j < columns; j += kWidth)
    for (int64_t i = 0; i < rows; i += kTileRows)
      tile_rows<1>(rows - i < kTileRows ? rows - i : kTileRows, depth, a + i * a_row, a_row, a_depth, b + j, b_stride,
                   c + i * c_stride + j, c_stride, add);
}

// Rows first .. last of one head as float, (rows, padded head_dim), zero-padded, times scale.
template <class T>
inline void unpack(const Heads4& x, int64_t b, int64_t h, int64_t first, int64_t last, int64_t head_dim, float scale,
                   float* out) {
  const int64_t width = padded(head_dim);
  for (int64_t t = first; t < last; ++t, out += width) {
    const auto* row = static_cast<const typename T::Value*>(x.data) + b * x.batch + h * x.head + t * x.token;
    for (int64_t d = 0; d < width; d += kWidth)
      store<F32>(out + d, d < head_dim ? load<T>(row + d, head_dim - d) * scale : Floats{});
  }
}

template <class T>
inline void pack(const Heads4& x, int64_t b, int64_t h, int64_t first, int64_t last, int64_t head_dim, float scale,
                 const float* in) {
  const int64_t width = padded(head_dim);
  for (int64_t t = first; t < last; ++t, in += width) {
    auto* row = static_cast<typename T::Value*>(x.data) + b * x.batch + h * x.head + t * x.token;
    for (int64_t d = 0; d < head_dim; d += kWidth) store<T>(row + d, load<F32>(in + d) * scale, head_dim - d);
  }
}

// (rows, width) to (width, stride), in blocks of 16 x 16 that stay in the first-level cache; zeros up to stride.
inline void transpose(const float* in, int64_t rows, int64_t width, float* out, int64_t stride) {
  for (int64_t r = 0; r < stride; r += 16)
    for (int64_t d = 0; d < width; ++d)
      for (int64_t i = r; i < r + 16; ++i) out[d * stride + i] = i < rows ? in[i * width + d] : 0.0f;
}

// The keys that a block of queries sees, relative to k0: from a multiple of 16, a multiple of 16 many.
struct Span {
  int64_t first, count;
};

inline Span span(const AttentionArgs& x, const Segment& s, int64_t q0, int64_t q1) {
  int64_t first = s.k1, last = s.k0;
  for (int64_t i = q0; i < q1; ++i) {
    const int64_t a = x.first_key(s.b, i), z = x.last_key(s.b, i);
    if (a >= z) continue;
    first = a < first ? a : first;
    last = z > last ? z : last;
  }
  if (first >= last) return {0, 0};
  first = (first - s.k0) / 16 * 16;
  return {first, padded(last - s.k0 - first)};
}

// Positions of a row that lie inside [first, last), as all ones; `at` is the index of the vector's first.
inline Ints inside(int64_t at, int64_t first, int64_t last) {
  Ints index;
  for (int i = 0; i < kWidth; ++i) index[i] = i;
  index += static_cast<int32_t>(at);
  return (index >= static_cast<int32_t>(first)) & (index < static_cast<int32_t>(last));
}

inline Floats select(Ints mask, Floats a, Floats b) { return mask ? a : b; }

// A row of scores to exp(score - largest) inside [first, last) and 0 outside; returns the sum. Both directions call it, so
// that the probabilities of the backward are those of the forward to the bit.
inline float exponentials(float* row, int64_t count, int64_t first, int64_t last) {
  if (first >= last) {
    for (int64_t j = 0; j < count; j += kWidth) store<F32>(row + j, Floats{});
    return 1.0f;
  }
  Floats most = all(-__builtin_inff());
  for (int64_t j = 0; j < count; j += kWidth) {
    const Floats v = select(inside(j, first, last), load<F32>(row + j), all(-__builtin_inff()));
    store<F32>(row + j, v);
    most = v > most || v != v ? v : most;
  }
  float top = most[0];
  for (int u = 1; u < kWidth; ++u) top = most[u] > top || most[u] != most[u] ? most[u] : top;
  Floats total = {};
  for (int64_t j = 0; j < count; j += kWidth) {
    const Floats e = exponential(load<F32>(row + j) - top);
    store<F32>(row + j, e);
    total += e;
  }
  return sum(total);
}

// Queries q0 .. q1 of the segment, all query heads of key/value head g.
template <class T>
inline void forward_task(const AttentionArgs& x, const Segment& s, int64_t g, int64_t q0, int64_t q1, float* scratch) {
  const int64_t width = padded(x.head_dim), keys = s.k1 - s.k0, stride = padded(keys), group = x.heads / x.kv_heads;
  float *values = scratch, *keys_t = values + stride * width, *scores = keys_t + stride * width;
  float *query = scores + kQueryBlock * stride, *result = query + kQueryBlock * width;
  unpack<T>(x.k, s.b, g, s.k0, s.k1, x.head_dim, 1.0f, values);
  transpose(values, keys, width, keys_t, stride);
  unpack<T>(x.v, s.b, g, s.k0, s.k1, x.head_dim, 1.0f, values);
  for (int64_t i = keys * width; i < stride * width; ++i) values[i] = 0.0f;
  for (int64_t h = g * group; h < (g + 1) * group; ++h) {
    for (int64_t i = q0; i < q1; i += kQueryBlock) {
      const int64_t rows = q1 - i < kQueryBlock ? q1 - i : kQueryBlock;
      const Span seen = span(x, s, i, i + rows);
      unpack<T>(x.q, s.b, h, i, i + rows, x.head_dim, x.scale, query);
      product(rows, seen.count, x.head_dim, query, width, 1, keys_t + seen.first, stride, scores, stride, false);
      float totals[kQueryBlock];
      for (int64_t r = 0; r < rows; ++r) {
        float* row = scores + r * stride;
        const int64_t offset = s.k0 + seen.first, first = x.first_key(s.b, i + r) - offset,
                      last = x.last_key(s.b, i + r) - offset;
        totals[r] = 1.0f / exponentials(row, seen.count, first, last);
      }
      product(rows, width, seen.count, scores, stride, 1, values + seen.first * width, width, result, width, false);
      for (int64_t r = 0; r < rows; ++r) {
        float* row = result + r * width;
        for (int64_t d = 0; d < width; d += kWidth) store<F32>(row + d, load<F32>(row + d) * totals[r]);
      }
      pack<T>(x.out, s.b, h, i, i + rows, x.head_dim, 1.0f, result);
    }
  }
}

// All queries of the segment and all query heads of key/value head g: dq of those, dk and dv of the segment's keys.
template <class T>
inline void backward_task(const AttentionArgs& x, const Segment& s, int64_t g, float* scratch) {
  const int64_t width = padded(x.head_dim), keys = s.k1 - s.k0, stride = padded(keys), group = x.heads / x.kv_heads;
  const int64_t area = stride * width;
  float *key = scratch, *keys_t = key + area, *values_t = keys_t + area, *dk = values_t + area, *dv = dk + area;
  float *scores = dv + area, *dscores = scores + kQueryBlock * stride;
  float *query = dscores + kQueryBlock * stride, *dout = query + kQueryBlock * width, *dq = dout + kQueryBlock * width;
  unpack<T>(x.v, s.b, g, s.k0, s.k1, x.head_dim, 1.0f, key);
  transpose(key, keys, width, values_t, stride);
  unpack<T>(x.k, s.b, g, s.k0, s.k1, x.head_dim, 1.0f, key);
  transpose(key, keys, width, keys_t, stride);
  for (int64_t i = keys * width; i < area; ++i) key[i] = 0.0f;
  memset(dk, 0, 2 * area * sizeof(float));
  for (int64_t h = g * group; h < (g + 1) * group; ++h) {
    for (int64_t i = s.q0; i < s.q1; i += kQueryBlock) {
      const int64_t rows = s.q1 - i < kQueryBlock ? s.q1 - i : kQueryBlock;
      const Span seen = span(x, s, i, i + rows);
      unpack<T>(x.q, s.b, h, i, i + rows, x.head_dim, x.scale, query);
      unpack<T>(x.dout, s.b, h, i, i + rows, x.head_dim, 1.0f, dout);
      product(rows, seen.count, x.head_dim, query, width, 1, keys_t + seen.first, stride, scores, stride, false);
      product(rows, seen.count, x.head_dim, dout, width, 1, values_t + seen.first, stride, dscores, stride, false);
      for (int64_t r = 0; r < rows; ++r) {
        float *row = scores + r * stride, *drow = dscores + r * stride;
        const int64_t offset = s.k0 + seen.first, first = x.first_key(s.b, i + r) - offset,
                      last = x.last_key(s.b, i + r) - offset;
        const float scale = 1.0f / exponentials(row, seen.count, first, last);
        Floats total = {};
        for (int64_t j = 0; j < seen.count; j += kWidth) {
          const Floats p = load<F32>(row + j) * scale;
          store<F32>(row + j, p);
          total += p * load<F32>(drow + j);
        }
        const float delta = sum(total);
        for (int64_t j = 0; j < seen.count; j += kWidth)
          store<F32>(drow + j, load<F32>(row + j) * (load<F32>(drow + j) - delta));
      }
      float* dk_seen = dk + seen.first * width;
      product(rows, width, seen.count, dscores, stride, 1, key + seen.first * width, width, dq, width, false);
      product(seen.count, width, rows, dscores, 1, stride, query, width, dk_seen, width, true);
      product(seen.count, width, rows, scores, 1, stride, dout, width, dv + seen.first * width, width, true);
      pack<T>(x.dq, s.b, h, i, i + rows, x.head_dim, x.scale, dq);
    }
  }
  pack<T>(x.dk, s.b, g, s.k0, s.k1, x.head_dim, 1.0f, dk);
  pack<T>(x.dv, s.b, g, s.k0, s.k1, x.head_dim, 1.0f, dv);
}

inline void attention_forward_task(const AttentionArgs& x, const Segment& s, int64_t g, int64_t q0, int64_t q1,
                                   float* scratch) {
  with_type(x.type, [&](auto t) { forward_task<decltype(t)>(x, s, g, q0, q1, scratch); });
}

inline void attention_backward_task(const AttentionArgs& x, const Segment& s, int64_t g, float* scratch) {
  with_type(x.type, [&](auto t) { backward_task<decltype(t)>(x, s, g, scratch); });
}
