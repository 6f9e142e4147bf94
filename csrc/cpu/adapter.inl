// What joins an adapter to the base product: its matrices as terms of the same contraction. Included once per
// instruction set, after panels.inl.

// n contiguous values of a dense matrix times `factor` as bf16 terms: out[t] holds the t-th of each.
inline void bf16_terms(const Matrix& m, int64_t i, int64_t n, float factor, int terms, uint16_t* const* out) {
  for (int64_t start = 0; start < n; start += 16) {
    const int count = static_cast<int>(n - start < 16 ? n - start : 16);
    float v[16];
    load_up_to_16(m.data, m.type, i + start, count, v);
    for (int j = 0; j < 16; ++j) v[j] *= factor;
    for (int t = 0; t < terms; ++t) {
      uint16_t term[16];
      for (int j = 0; j < 16; ++j) term[j] = float_to_bf16(v[j]);
      for (int j = 0; j < 16; ++j) v[j] -= bf16_to_float(term[j]);
      memcpy(out[t] + start, term, static_cast<size_t>(count) * 2);
    }
  }
}

// A dense matrix as matrices that a product of pairs takes: three bf16 terms, or itself.
struct Terms {
  Source term[3];
  int count = 1;
};

template <bool kPairs>
inline Terms split(const Source& s, bool threads, uint16_t* buffer) {
  Terms out;
  out.term[0] = s;
  if (!kPairs || s.m.type == Type::bf16) return out;
  const int64_t n = s.m.rows * s.m.cols;
  out.count = 3;
  for (int t = 0; t < 3; ++t) out.term[t] = dense(buffer + t * n, Type::bf16, s.m.rows, s.m.cols);
  in_parallel(s.m.rows, threads, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * s.m.cols;
    uint16_t* const to[3] = {buffer + at, buffer + n + at, buffer + 2 * n + at};
    bf16_terms(s.m, at, (end - begin) * s.m.cols, 1.0f, 3, to);
  });
  return out;
}

// On the tile unit the adapter is more columns of the contraction, in terms; else floats, multiplied as such.

// Rows of an (n, rank) matrix times `factor` as those columns: [v1 | v2 | v1] beside [w1 | w1 | w2] of the other operand.
inline void widen_rows(const void* data, Type type, int64_t row0, int64_t row1, int64_t rank, float factor, bool first,
                       uint16_t* out) {
  const Source s = dense(data, type, row1, rank);
  for (int64_t n = row0; n < row1; ++n) {
    uint16_t* to = out + n * 3 * rank;
    uint16_t* const parts[2] = {to, to + (first ? 1 : 2) * rank};
    bf16_terms(s.m, n * rank, rank, factor, 2, parts);
    memcpy(to + (first ? 2 : 1) * rank, to, static_cast<size_t>(rank) * 2);
  }
}

// (rank, cols) as more rows of the contraction: [w1 ; w1 ; w2].
inline Source widen_columns(const Source& a, bool threads, uint16_t* to) {
  const int64_t n = a.m.rows * a.m.cols;
  in_parallel(a.m.rows, threads, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * a.m.cols, count = (end - begin) * a.m.cols;
    uint16_t* const parts[2] = {to + at, to + 2 * n + at};
    bf16_terms(a.m, at, count, 1.0f, 2, parts);
    memcpy(to + n + at, to + at, static_cast<size_t>(count) * 2);
  });
  return dense(to, Type::bf16, 3 * a.m.rows, a.m.cols);
}

// Values [begin, end) of a dense matrix times `factor`.
inline void scaled_floats(const void* data, Type type, int64_t begin, int64_t end, float factor, float* out) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    const auto* from = static_cast<const typename T::Value*>(data);
    for (int64_t i = begin; i < end; i += kWidth) store<F32>(out + i, load<T>(from + i, end - i) * factor, end - i);
  });
}

// The transpose of a (rows, cols) matrix of floats.
inline Source transposed(const float* data, int64_t rows, int64_t cols, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) out[c * rows + r] = data[r * cols + c];
  return dense(out, Type::f32, cols, rows);
}

// A count of 16-bit values up to a whole number of cache lines.
constexpr int64_t aligned(int64_t n) { return (n + 31) / 32 * 32; }
