// A few queries against many keys, as in decoding: reading the keys is the work, and packing them would cost more than
// the products. Included by prefix_attention.inl.
//
// The keys are cut into parts of kPartKeys, the prefix's first. Each gives its own softmax: a row of weighted values,
// behind it the largest score and the sum of the exponentials. They are merged in their order, so that the bits are the
// same whether one task takes all parts of a head or each part is a task.

// kWidth vectors to the vector of their sums.
inline Floats sums_of(Floats* v) {
  Ints even, odd;
  for (int i = 0; i < kWidth; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  for (int n = kWidth; n > 1; n /= 2)
    for (int i = 0; i < n / 2; ++i)
      v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) + __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
  return v[0];
}

// Scores of `count` keys with ROWS queries, zeros up to a multiple of kWidth.
template <class From, class To, int ROWS>
inline void few_scores(const typename From::Value* key, int64_t step, int64_t count, int64_t head_dim,
                       const float* query, int64_t width, float* scores) {
  for (int64_t j = 0; j < count; j += kWidth) {
    Floats sums[ROWS][kWidth] = {};
    for (int64_t u = 0; u < kWidth && j + u < count; ++u) {
      Floats total[ROWS] = {};
      for (int64_t d = 0; d < head_dim; d += kWidth) {
        const Floats k = load_as<From, To>(key + (j + u) * step + d, head_dim - d);
#pragma GCC unroll 3
        for (int r = 0; r < ROWS; ++r) total[r] = multiply_add(load<F32>(query + r * width + d), k, total[r]);
      }
      for (int r = 0; r < ROWS; ++r) sums[r][u] = total[r];
    }
    for (int r = 0; r < ROWS; ++r) store<F32>(scores + r * kPartKeys + j, sums_of(sums[r]));
  }
}

// Sums of `count` values weighted by ROWS rows of p, VECTORS at a time.
template <class From, class To, int ROWS>
inline void few_values(const typename From::Value* value, int64_t step, int64_t count, int64_t head_dim, const float* p,
                       float* out, int64_t out_step) {
  constexpr int kVectors = 4;
  for (int64_t d = 0; d < head_dim; d += kVectors * kWidth) {
    Floats sums[ROWS][kVectors] = {};
    for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = d + v * kWidth;
        if (at >= head_dim) continue;
        const Floats one = load_as<From, To>(value + j * step + at, head_dim - at);
#pragma GCC unroll 3
        for (int r = 0; r < ROWS; ++r) sums[r][v] = multiply_add(all(p[r * kPartKeys + j]), one, sums[r][v]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < kVectors; ++v)
        if (d + v * kWidth < head_dim) store<F32>(out + r * out_step + d + v * kWidth, sums[r][v]);
  }
}

// ROWS rows from `row` on of key/value head g, for keys key0 .. key0 + count of the prefix or of the real ones.
template <class From, class To, int ROWS>
inline void few_rows(const PrefixAttentionArgs& x, const Heads4& keys, const Heads4& values, bool real, int64_t b,
                     int64_t kv_b, int64_t g, int64_t row, int64_t key0, int64_t count, float* out, Carver scratch) {
  const int64_t width = padded(x.head_dim), out_step = width + 16;
  float *query = scratch.floats(ROWS * width), *scores = scratch.floats(ROWS * kPartKeys);
  float* bias = scratch.floats(kPartKeys);
  for (int r = 0; r < ROWS; ++r)  // To is rounded to by the keys; a query is of that type already
    for (int64_t d = 0; d < width; d += kWidth)
      store<F32>(query + r * width + d,
                 d < x.head_dim
                     ? load<To>(row_of<To>(x.q, b, g * x.group() + (row + r) % x.group(), (row + r) / x.group()) + d,
                                x.head_dim - d)
                     : Floats{});
  few_scores<From, To, ROWS>(row_of<From>(keys, kv_b, g, key0), keys.token, count, x.head_dim, query, width, scores);
  for (int r = 0; r < ROWS; ++r) {
    const int64_t t = (row + r) / x.group(), h = g * x.group() + (row + r) % x.group(), columns = padded(count);
    float *line = scores + r * kPartKeys, *end = out + r * out_step + width;
    for (int64_t j = (count + kWidth - 1) / kWidth * kWidth; j < columns; j += kWidth) store<F32>(line + j, Floats{});
    const int64_t first = real ? x.first_key(b, t) - key0 : 0, last = real ? x.last_key(b, t) - key0 : count;
    const float* added = real ? bias_of(x, b, h, t, key0, columns, bias) : nullptr;
    end[0] = largest(score_part(x, line, columns, first, last < count ? last : count, added, all(-__builtin_inff())));
    end[1] = exponentials<F32>(line, columns, end[0] == -__builtin_inff() ? 0.0f : end[0], nullptr);
  }
  few_values<From, To, ROWS>(row_of<From>(values, kv_b, g, key0), values.token, count, x.head_dim, scores, out,
                             out_step);
}

template <class From, class To>
inline void few_part(const PrefixAttentionArgs& x, bool real, int64_t b, int64_t g, int64_t key0, int64_t count,
                     float* out, Carver scratch) {
  const Heads4 &keys = real ? x.k : x.prefix_k, &values = real ? x.v : x.prefix_v;
  const int64_t kv_b = !real && x.shared ? 0 : b, step = padded(x.head_dim) + 16;
  int64_t row = 0;
  for (; row + 3 <= x.rows(); row += 3)
    few_rows<From, To, 3>(x, keys, values, real, b, kv_b, g, row, key0, count, out + row * step, scratch);
  if (x.rows() - row == 2)
    few_rows<From, To, 2>(x, keys, values, real, b, kv_b, g, row, key0, count, out + row * step, scratch);
  if (x.rows() - row == 1)
    few_rows<From, To, 1>(x, keys, values, real, b, kv_b, g, row, key0, count, out + row * step, scratch);
}

// The part of keys that no query sees.
inline void few_nothing(const PrefixAttentionArgs& x, float* out) {
  const int64_t width = padded(x.head_dim);
  for (int64_t r = 0; r < x.rows(); ++r, out += width + 16) {
    memset(out, 0, width * sizeof(float));
    out[width] = -__builtin_inff(), out[width + 1] = 0.0f;
  }
}

inline void prefix_attention_few_part(const PrefixAttentionArgs& x, int64_t b, int64_t g, int64_t part, float* out,
                                      uint32_t* scratch) {
  const int64_t before = (x.prefix + kPartKeys - 1) / kPartKeys;
  const bool real = part >= before;
  int64_t key0 = (real ? part - before : part) * kPartKeys, end = real ? x.keys : x.prefix;
  if (key0 + kPartKeys < end) end = key0 + kPartKeys;
  if (real) {  // what no query sees is left out by sixteens, so that the others keep their places in the sums
    const Seen seen = seen_by(x, b, 0, x.queries, 0, 16);
    if (seen.first > key0) key0 = seen.first;
    if (seen.first + seen.count < end) end = seen.first + seen.count;
  }
  if (key0 >= end) return few_nothing(x, out);
  const int64_t count = end - key0;
  with_type(x.type, [&](auto type) {
    using T = decltype(type);
    if (!real && x.prefix_type != T::type) few_part<F32, T>(x, real, b, g, key0, count, out, Carver{scratch});
    else few_part<T, T>(x, real, b, g, key0, count, out, Carver{scratch});
  });
}

// out and lse of all rows of a head from its parts, which lie one behind another.
inline void prefix_attention_few_merge(const PrefixAttentionArgs& x, int64_t b, int64_t g, int64_t parts,
                                       const float* from, uint32_t* scratch) {
  const int64_t width = padded(x.head_dim), step = width + 16, part_step = x.rows() * step;
  float* result = reinterpret_cast<float*>(scratch);
  for (int64_t row = 0; row < x.rows(); ++row, from += step) {
    float top = -__builtin_inff(), total = 0.0f;
    for (int64_t p = 0; p < parts; ++p) top = from[p * part_step + width] > top ? from[p * part_step + width] : top;
    if (top == -__builtin_inff()) top = 0.0f;
    memset(result, 0, width * sizeof(float));
    for (int64_t p = 0; p < parts; ++p) {
      const float *part = from + p * part_step, weight = exponential_below(all(part[width] - top))[0];
      total += weight * part[width + 1];
      for (int64_t d = 0; d < x.head_dim; d += kWidth)
        store<F32>(result + d, multiply_add(all(weight), load<F32>(part + d), load<F32>(result + d)));
    }
    const int64_t t = row / x.group(), h = g * x.group() + row % x.group();
    x.lse[(b * x.heads + h) * x.queries + t] = top + __builtin_logf(total);
    with_type(x.type, [&](auto type) {
      using T = decltype(type);
      write_row<T>(row_of<T>(x.out, b, h, t), x.head_dim, total == 0.0f ? 0.0f : 1.0f / total, result);
    });
  }
}
