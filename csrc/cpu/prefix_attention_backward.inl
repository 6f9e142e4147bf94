// The backward of attention over a prefix and real keys. Included once per instruction set, by prefix_attention.inl.

// The sums that a head's gradients are: rows of `width` floats, those of the values behind those of the keys.
struct Sums {
  float *k, *v;
};

inline Sums carve_sums(Carver& from, int64_t keys, int64_t width) {
  Sums out;
  out.k = from.floats(2 * padded(keys) * width);
  out.v = out.k + padded(keys) * width;
  memset(out.k, 0, 2 * padded(keys) * width * sizeof(float));
  return out;
}

// What one block of rows works on.
struct Block {
  float *scores, *dscores, *dq, *bias;
  uint32_t* ds;  // dS as pairs, and before that what capping multiplies it with
  uint32_t *query, *dout, *query_along, *dout_along;
};

template <class T>
inline Block carve_block(Carver& from, const Sizes<T>& n, int64_t keys) {
  Block out;
  out.scores = from.floats(kRowBlock * n.stride);
  out.dscores = from.floats(kRowBlock * n.stride);
  out.dq = from.floats(kRowBlock * n.width);
  out.bias = from.floats(padded(keys));
  out.ds = from.words(kRowBlock * n.stride);
  out.query = from.words(kRowBlock * n.row);
  out.dout = from.words(kRowBlock * n.row);
  out.query_along = from.words(kRowBlock * up_to_panels(n.width));
  out.dout_along = from.words(kRowBlock * up_to_panels(n.width));
  return out;
}

// A block's rows times keys, a part of the depth at a time: what is rounded here is rounded again in every gradient.
template <int W, class N>
inline void scores(int64_t rows, int64_t columns, const N& n, const uint32_t* a, const uint32_t* b, float* c) {
  constexpr int64_t kPart = 32;
  for (int64_t d = 0; d < n.depth; d += kPart)
    product<W>(rows, columns, n.depth - d < kPart ? n.depth - d : kPart, a + d, n.row, 1, b + d * kPanel, n.across, c,
               n.stride, d > 0);
}

// P and dS = P (dP - sum(P dP)) of a row, in place of exp(S - its largest) and dP.
inline void gradient_row(float* row, float* drow, int64_t count, float inverse) {
  Floats weighted = {};
  for (int64_t j = 0; j < count; j += kWidth) {
    const Floats p = load<F32>(row + j) * inverse;
    store<F32>(row + j, p);
    weighted = multiply_add(p, load<F32>(drow + j), weighted);
  }
  const float delta = sum(weighted);
  for (int64_t j = 0; j < count; j += kWidth) store<F32>(drow + j, load<F32>(row + j) * (load<F32>(drow + j) - delta));
}

// The same with dropout: m P, what the values were weighted with, in place of exp, and dS = P (m dP - sum(P m dP)).
// Between the two loops the sign of P tells what was taken: the hash is worth one look.
inline void dropped_gradient_row(float* row, float* drow, int64_t count, float inverse, const DroppedRow& dropped) {
  const Floats scale = all(dropped.dropout.scale);
  const Ints sign = Ints{} + INT32_MIN;
  Floats weighted = {};
  for (int64_t j = 0; j < count; j += kWidth) {
    const Floats p = load<F32>(row + j) * inverse;
    const Ints kept = dropped.keep(j);
    const Floats dp = (Floats)((Ints)(load<F32>(drow + j) * scale) & kept);
    store<F32>(row + j, (Floats)((Ints)p | (~kept & sign)));
    store<F32>(drow + j, dp);
    weighted = multiply_add(p, dp, weighted);
  }
  const float delta = sum(weighted);
  for (int64_t j = 0; j < count; j += kWidth) {
    const Ints signed_p = (Ints)load<F32>(row + j);
    const Floats p = (Floats)(signed_p & ~sign);
    store<F32>(drow + j, p * (load<F32>(drow + j) - delta));
    store<F32>(row + j, (Floats)((Ints)(p * scale) & ~(signed_p >> 31)));
  }
}

// Rows of P and dS (`count` columns) rounded to pairs: dS as left operand into ds, and both, for the products whose
// contraction runs over the rows, in place: two rows become one of pairs, which lies in a row that was read before.
inline void pair_rows(const Block& x, int64_t rows, int64_t count, int64_t stride) {
  uint32_t *low = x.ds + kRowBlock / 2 * stride, *high = low + stride / 2;
  for (int64_t r = 0; r < rows; r += 2) {
    for (int which = 0; which < 2; ++which) {
      float* from = which == 0 ? x.dscores : x.scores;
      uint32_t *first = which == 0 ? x.ds + r * stride / 2 : low, *second = which == 0 ? first + stride / 2 : high;
      for (int64_t j = 0; j < count; j += kWidth) {
        store<Bf16>(reinterpret_cast<uint16_t*>(first) + j, load<F32>(from + r * stride + j));
        const Floats v = r + 1 < rows ? load<F32>(from + (r + 1) * stride + j) : Floats{};
        store<Bf16>(reinterpret_cast<uint16_t*>(second) + j, v);
      }
      for (int64_t j = 0; j < count; j += kWidth) {
        const Words words = pair_up(first, second, j);
        memcpy(from + r / 2 * stride + j, &words, sizeof(words));
      }
    }
  }
}

// Rows i .. i + rows: dq of those, and their part of the gradients of the prefix and of the real keys from `origin` on.
template <class T>
inline void backward_block(const PrefixAttentionArgs& x, const Sizes<T>& n, int64_t b, int64_t g, int64_t i,
                           int64_t rows, int64_t origin, const Keys& prefix, const Keys& keys, const Sums& dprefix,
                           const Sums& dkeys, const Block& s) {
  constexpr int W = Sizes<T>::W;
  const int64_t group = x.group(), even = (rows + W - 1) / W * W;
  const Seen seen = seen_by(x, b, i / group, (i + rows - 1) / group + 1, origin, kSeenUnit);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = (i + r) / group, h = g * group + (i + r) % group;
    read_row<T, T>(row_of<T>(x.q, b, h, t), x.head_dim, n.width, s.query + r * n.row);
    read_row<T, T>(row_of<T>(x.dout, b, h, t), x.head_dim, n.width, s.dout + r * n.row);
  }
  memset(s.query + rows * n.row, 0, (even - rows) * n.row * sizeof(uint32_t));
  memset(s.dout + rows * n.row, 0, (even - rows) * n.row * sizeof(uint32_t));
  put_along<W>(s.query, n.row, even, 0, kRowBlock / W, n.width, s.query_along);
  put_along<W>(s.dout, n.row, even, 0, kRowBlock / W, n.width, s.dout_along);
  float *real = s.scores + n.prefix, *dreal = s.dscores + n.prefix;
  const int64_t from = seen.first * n.depth;
  scores<W>(rows, n.prefix, n, s.query, prefix.k_across, s.scores);
  scores<W>(rows, n.prefix, n, s.dout, prefix.v_across, s.dscores);
  scores<W>(rows, seen.count, n, s.query, keys.k_across + from, real);
  scores<W>(rows, seen.count, n, s.dout, keys.v_across + from, dreal);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = (i + r) / group, h = g * group + (i + r) % group, at = origin + seen.first;
    float *row = s.scores + r * n.stride, *behind = row + n.prefix;
    // The largest and the sum once more: lse is rounded, and its rounding would be one of every P of the row.
    float* slopes = x.softcap > 0.0f ? reinterpret_cast<float*>(s.ds) + r * n.stride : nullptr;
    Floats most = score_part(x, row, n.prefix, 0, x.prefix, nullptr, all(-__builtin_inff()), slopes);
    most =
        score_part(x, behind, seen.count, x.first_key(b, t) - at, x.last_key(b, t) - at,
                   bias_of(x, b, h, t, at, seen.count, s.bias), most, slopes == nullptr ? slopes : slopes + n.prefix);
    const float top = largest(most), safe = top == -__builtin_inff() ? 0.0f : top;
    const float total = exponentials<F32>(row, n.prefix + seen.count, safe, nullptr);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    float* drow = s.dscores + r * n.stride;
    if (x.dropout_p > 0.0f) dropped_gradient_row(row, drow, n.prefix + seen.count, inverse, {x, b, h, t, n.prefix, at});
    else gradient_row(row, drow, n.prefix + seen.count, inverse);
    if (slopes != nullptr)
      for (int64_t j = 0; j < n.prefix + seen.count; j += kWidth)
        store<F32>(drow + j, load<F32>(drow + j) * load<F32>(slopes + j));
  }
  if constexpr (W == 2) pair_rows(s, rows, n.prefix + seen.count, n.stride);
  const uint32_t* ds = W == 2 ? s.ds : reinterpret_cast<const uint32_t*>(s.dscores);
  product<W>(rows, n.width, n.prefix / W, ds, n.stride / W, 1, prefix.k_along, prefix.words * kPanel, s.dq, n.width,
             false);
  product<W>(rows, n.width, seen.count / W, ds + n.prefix / W, n.stride / W, 1, keys.k_along + seen.first / W * kPanel,
             keys.words * kPanel, s.dq, n.width, true);
  for (int64_t r = 0; r < rows; ++r)
    write_row<T>(row_of<T>(x.dq, b, g * group + (i + r) % group, (i + r) / group), x.head_dim, x.scale,
                 s.dq + r * n.width);
  const auto add = [&](int64_t count, const float* left, const uint32_t* right, float* to) {
    product<W>(count, n.width, even / W, left, 1, n.stride, right, n.block, to, n.width, true);
  };
  add(n.prefix, s.dscores, s.query_along, dprefix.k);
  add(n.prefix, s.scores, s.dout_along, dprefix.v);
  add(seen.count, dreal, s.query_along, dkeys.k + seen.first * n.width);
  add(seen.count, real, s.dout_along, dkeys.v + seen.first * n.width);
}

// The gradient of a prefix from the sums of `chunks` tasks, `step` floats apart: always in that order.
inline void write_prefix(const PrefixAttentionArgs& x, int64_t b, int64_t g, const float* sums, int64_t chunks,
                         int64_t step, float* row) {
  const int64_t width = padded(x.head_dim);
  with_type(x.prefix_type, [&](auto type) {
    using P = decltype(type);
    for (int64_t i = 0; i < 2 * x.prefix; ++i) {
      const bool values = i >= x.prefix;
      const int64_t j = values ? i - x.prefix : i;
      const float* from = sums + (values ? padded(x.prefix) + j : j) * width;
      for (int64_t d = 0; d < width; d += kWidth) {
        Floats total = {};
        for (int64_t c = 0; c < chunks; ++c) total += load<F32>(from + c * step + d);
        store<F32>(row + d, total);
      }
      write_row<P>(row_of<P>(values ? x.dprefix_v : x.dprefix_k, b, g, j), x.head_dim, values ? 1.0f : x.scale, row);
    }
  });
}

// The queries and keys of a segment, key/value head g: dq, dk, dv, and what they add to the sums of the prefix.
template <class T>
inline void backward_segment(const PrefixAttentionArgs& x, const Sizes<T>& n, const Segment& s, int64_t g,
                             const Keys& prefix, const Sums& dprefix, Carver rest) {
  const int64_t count = s.k1 - s.k0, end = s.q1 * x.group();
  const Keys keys = carve_keys(rest, n, count, x.head_dim, true);
  const Sums dkeys = carve_sums(rest, count, n.width);
  const Block block = carve_block(rest, n, x.keys);
  pack_keys<T, T>(x.k, x.v, s.b, g, s.k0, s.k1, n, x.head_dim, keys, rest);
  for (int64_t i = s.q0 * x.group(); i < end; i += kRowBlock)
    backward_block(x, n, s.b, g, i, end - i < kRowBlock ? end - i : kRowBlock, s.k0, prefix, keys, dprefix, dkeys,
                   block);
  for (int64_t j = 0; j < count; ++j) {
    write_row<T>(row_of<T>(x.dk, s.b, g, s.k0 + j), x.head_dim, x.scale, dkeys.k + j * n.width);
    write_row<T>(row_of<T>(x.dv, s.b, g, s.k0 + j), x.head_dim, 1.0f, dkeys.v + j * n.width);
  }
}

// Rows b0 .. b1 of the batch, key/value head g: dq, dk, dv, and the sums of the prefix's gradient, added up in `shares`
// or, where the prefix is not shared, written.
template <class T>
inline void backward_batch(const PrefixAttentionArgs& x, int64_t b0, int64_t b1, int64_t g, float* shares,
                           Carver scratch) {
  const Sizes<T> n(x);
  Carver own{reinterpret_cast<uint32_t*>(shares)};
  const Sums dprefix = carve_sums(x.shared ? own : scratch, x.prefix, n.width);
  for (int64_t b = b0; b < b1; ++b) {
    Carver rest = scratch;
    const Keys prefix = prefix_keys(x, b, g, n, true, rest);
    backward_segment(x, n, {b, 0, x.queries, 0, x.keys}, g, prefix, dprefix, rest);
  }
  if (!x.shared) write_prefix(x, b0, g, dprefix.k, 1, 0, scratch.floats(n.width));
}
