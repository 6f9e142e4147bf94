// Attention over a prefix and real keys. Included once per instruction set; the maths is in
// peft_engine/ops/prefix_attention.py. A row of the batch is computed in the same steps whatever stands beside it.
#include "cpu/attention_tiles.inl"

// Parts of a buffer, each on a cache line of its own.
struct Carver {
  uint32_t* at;
  uint32_t* words(int64_t count) {
    uint32_t* out = at;
    at += padded(count);
    return out;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(words(count)); }
};

// What the loops of a call share: sizes in values and in words.
template <class T>
struct Sizes {
  static constexpr int W = kPerWord<T>;
  int64_t width, row, depth;  // head_dim padded; words of a row as left operand; words of the contraction over it
  int64_t prefix, stride;     // columns of the prefix in a row of scores; of the whole row
  int64_t across;             // from panel to panel of keys whose contraction runs over head_dim
  int64_t block = kRowBlock / W * kPanel;  // the same of a block of rows whose contraction runs over them

  explicit Sizes(const PrefixAttentionArgs& x)
      : width(padded(x.head_dim)),
        row(width / W),
        depth((x.head_dim + W - 1) / W),
        prefix(padded(x.prefix)),
        stride(score_stride(x.prefix, x.keys)),
        across(depth * kPanel) {}
};

// Keys and values of one head as right operands; what is not asked for is null.
struct Keys {
  uint32_t *k_across = nullptr, *k_along = nullptr, *v_across = nullptr, *v_along = nullptr;
  int64_t words = 0;  // of the contraction over the keys
};

template <class T>
inline Keys carve_keys(Carver& from, const Sizes<T>& n, int64_t keys, int64_t head_dim, bool backward) {
  const int64_t words = operand_words(keys, head_dim);
  Keys out;
  out.words = padded(keys) / n.W;
  out.k_across = from.words(words);
  if (backward) {
    out.v_across = from.words(words);
    out.k_along = from.words(words);
  } else {
    out.v_along = from.words(words);
  }
  return out;
}

template <class From, class To>
inline void pack_matrix(const Heads4& x, int64_t b, int64_t h, int64_t first, int64_t last, const Sizes<To>& n,
                        int64_t head_dim, int64_t words, uint32_t* across, uint32_t* along, uint32_t* rows) {
  for (int64_t i = first; i < last; i += 16) {
    const int64_t count = last - i < 16 ? last - i : 16;
    for (int64_t r = 0; r < count; ++r)
      read_row<From, To>(row_of<From>(x, b, h, i + r), head_dim, n.width, rows + r * n.row);
    memset(rows + count * n.row, 0, (16 - count) * n.row * sizeof(uint32_t));
    if (across != nullptr) put_across(rows, n.row, n.depth, i - first, across);
    if (along != nullptr) put_along<kPerWord<To>>(rows, n.row, 16, i - first, words, n.width, along);
  }
}

template <class From, class To>
inline void pack_keys(const Heads4& k, const Heads4& v, int64_t b, int64_t h, int64_t first, int64_t last,
                      const Sizes<To>& n, int64_t head_dim, const Keys& out, Carver scratch) {
  uint32_t* rows = scratch.words(16 * n.row);
  pack_matrix<From, To>(k, b, h, first, last, n, head_dim, out.words, out.k_across, out.k_along, rows);
  pack_matrix<From, To>(v, b, h, first, last, n, head_dim, out.words, out.v_across, out.v_along, rows);
}

template <class T>
inline void pack_prefix(const PrefixAttentionArgs& x, int64_t b, int64_t g, const Sizes<T>& n, const Keys& out,
                        Carver scratch) {
  if (x.prefix_type == T::type) pack_keys<T, T>(x.prefix_k, x.prefix_v, b, g, 0, x.prefix, n, x.head_dim, out, scratch);
  else pack_keys<F32, T>(x.prefix_k, x.prefix_v, b, g, 0, x.prefix, n, x.head_dim, out, scratch);
}

// The prefix as operands: the call's own copy where it is shared, else packed here.
template <class T>
inline Keys prefix_keys(const PrefixAttentionArgs& x, int64_t b, int64_t g, const Sizes<T>& n, bool backward,
                        Carver& scratch) {
  if (x.shared) {
    const int64_t words = 3 * operand_words(x.prefix, x.head_dim);
    Carver packed{const_cast<uint32_t*>(x.packed) + g * words};
    return carve_keys(packed, n, x.prefix, x.head_dim, backward);
  }
  const Keys out = carve_keys(scratch, n, x.prefix, x.head_dim, backward);
  pack_prefix(x, b, g, n, out, scratch);
  return out;
}

// Real keys first .. last, seen by some query of a block, both relative to the first one packed: from the start of a
// panel, a multiple of 16 many.
struct Seen {
  int64_t first, count;
};

inline Seen seen_by(const PrefixAttentionArgs& x, int64_t b, int64_t t0, int64_t t1, int64_t origin, int64_t unit) {
  int64_t first = x.keys, last = 0;
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t from = x.first_key(b, t), to = x.last_key(b, t);
    if (from >= to) continue;
    first = from < first ? from : first;
    last = to > last ? to : last;
  }
  if (first >= last) return {0, 0};
  first = (first - origin) / unit * unit;
  return {first, padded(last - origin - first)};
}

// What is added to the scores of one query, for `count` keys from `first` on; null where there is nothing.
inline const float* bias_of(const PrefixAttentionArgs& x, int64_t b, int64_t h, int64_t t, int64_t first, int64_t count,
                            float* buffer) {
  if (x.bias == nullptr) return nullptr;
  const int64_t at = b * x.bias_batch + h * x.bias_head + t * x.bias_query + first * x.bias_key;
  const int64_t there = x.keys - first < count ? x.keys - first : count;
  for (int64_t j = 0; j < count; j += 16) {
    const int n = static_cast<int>(there - j < 16 ? there - j : 16);
    if (x.bias_key == 1 && n > 0) {
      load_up_to_16(x.bias, x.bias_type, at + j, n, buffer + j);
      continue;
    }
    for (int i = 0; i < 16; ++i)
      buffer[j + i] = i < n ? load_one(x.bias, x.bias_type, at + (j + i) * x.bias_key) : 0.0f;
  }
  return buffer;
}

// Product to score: scaled, with the bias, -inf outside of [first, last).
inline Floats score(const float* row, int64_t j, int64_t first, int64_t last, float scale, const float* bias) {
  Floats v = load<F32>(row + j) * scale;
  if (bias != nullptr) v += load<F32>(bias + j);
  return j >= first && j + kWidth <= last ? v : select(inside(j, first, last), v, all(-__builtin_inff()));
}

inline Floats score_part(float* row, int64_t count, int64_t first, int64_t last, float scale, const float* bias,
                         Floats most) {
  for (int64_t j = 0; j < count; j += kWidth) {
    const Floats v = score(row, j, first, last, scale, bias);
    store<F32>(row + j, v);
    most = at_least(v, most);
  }
  return most;
}

// A row of scores to exp(score - lse) without its division: as left operand, at `row` itself where words are floats.
template <class T>
inline float exponentials(float* row, int64_t count, float top, uint32_t* pairs) {
  Floats total = {};
  for (int64_t j = 0; j < count; j += kWidth) {
    const Floats e = exponential_below(load<F32>(row + j) - top);
    if constexpr (kPerWord<T> == 2) store<Bf16>(reinterpret_cast<uint16_t*>(pairs) + j, e);
    else store<F32>(row + j, e);
    total += e;
  }
  return sum(total);
}

// Rows row0 .. row1 of key/value head g: out and lse.
template <class T>
inline void forward_rows(const PrefixAttentionArgs& x, int64_t b, int64_t g, int64_t row0, int64_t row1,
                         Carver scratch) {
  const Sizes<T> n(x);
  constexpr int W = Sizes<T>::W;
  const int64_t group = x.group();
  const Keys prefix = prefix_keys(x, b, g, n, false, scratch);
  Seen seen = seen_by(x, b, row0 / group, (row1 - 1) / group + 1, 0, kMostPanel);
  const int64_t origin = seen.first, end = origin + seen.count < x.keys ? origin + seen.count : x.keys;
  const Keys keys = carve_keys(scratch, n, end - origin, x.head_dim, false);
  float *scores = scratch.floats(kRowBlock * n.stride), *result = scratch.floats(kRowBlock * n.width);
  uint32_t *pairs = scratch.words(kRowBlock * n.stride / 2), *query = scratch.words(kRowBlock * n.row);
  float* bias = scratch.floats(padded(x.keys));
  pack_keys<T, T>(x.k, x.v, b, g, origin, end, n, x.head_dim, keys, scratch);
  for (int64_t i = row0; i < row1; i += kRowBlock) {
    const int64_t rows = row1 - i < kRowBlock ? row1 - i : kRowBlock;
    seen = seen_by(x, b, i / group, (i + rows - 1) / group + 1, origin, kPanel);
    for (int64_t r = 0; r < rows; ++r)
      read_row<T, T>(row_of<T>(x.q, b, g * group + (i + r) % group, (i + r) / group), x.head_dim, n.width,
                     query + r * n.row);
    product<W>(rows, n.prefix, n.depth, query, n.row, 1, prefix.k_across, n.across, scores, n.stride, false);
    product<W>(rows, seen.count, n.depth, query, n.row, 1, keys.k_across + seen.first * n.depth, n.across,
               scores + n.prefix, n.stride, false);
    float inverse[kRowBlock];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = (i + r) / group, h = g * group + (i + r) % group, at = origin + seen.first;
      float *row = scores + r * n.stride, *real = row + n.prefix;
      Floats most = score_part(row, n.prefix, 0, x.prefix, x.scale, nullptr, all(-__builtin_inff()));
      most = score_part(real, seen.count, x.first_key(b, t) - at, x.last_key(b, t) - at, x.scale,
                        bias_of(x, b, h, t, at, seen.count, bias), most);
      const float top = largest(most), safe = top == -__builtin_inff() ? 0.0f : top;
      const float total = exponentials<T>(row, n.prefix + seen.count, safe, pairs + r * n.stride / 2);
      inverse[r] = total == 0.0f ? 0.0f : 1.0f / total;
      x.lse[(b * x.heads + h) * x.queries + t] = safe + __builtin_logf(total);
    }
    const uint32_t* p = W == 2 ? pairs : reinterpret_cast<const uint32_t*>(scores);
    product<W>(rows, n.width, n.prefix / W, p, n.stride / W, 1, prefix.v_along, prefix.words * kPanel, result, n.width,
               false);
    product<W>(rows, n.width, seen.count / W, p + n.prefix / W, n.stride / W, 1, keys.v_along + seen.first / W * kPanel,
               keys.words * kPanel, result, n.width, true);
    for (int64_t r = 0; r < rows; ++r)
      write_row<T>(row_of<T>(x.out, b, g * group + (i + r) % group, (i + r) / group), x.head_dim, inverse[r],
                   result + r * n.width);
  }
}

// --- backward ---------------------------------------------------------------------------------------------------------

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
  uint32_t *ds, *query, *dout, *query_along, *dout_along;
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

// Rows i .. i + rows: dq of those, and their part of the gradients of the prefix and of the real keys.
template <class T>
inline void backward_block(const PrefixAttentionArgs& x, const Sizes<T>& n, int64_t b, int64_t g, int64_t i,
                           int64_t rows, const Keys& prefix, const Keys& keys, const Sums& dprefix, const Sums& dkeys,
                           const Block& s) {
  constexpr int W = Sizes<T>::W;
  const int64_t group = x.group(), even = (rows + W - 1) / W * W;
  const Seen seen = seen_by(x, b, i / group, (i + rows - 1) / group + 1, 0, kPanel);
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
    const int64_t t = (i + r) / group, h = g * group + (i + r) % group;
    float *row = s.scores + r * n.stride, *behind = row + n.prefix;
    // The largest and the sum once more: lse is rounded, and its rounding would be one of every P of the row.
    Floats most = score_part(row, n.prefix, 0, x.prefix, x.scale, nullptr, all(-__builtin_inff()));
    most = score_part(behind, seen.count, x.first_key(b, t) - seen.first, x.last_key(b, t) - seen.first, x.scale,
                      bias_of(x, b, h, t, seen.first, seen.count, s.bias), most);
    const float top = largest(most), safe = top == -__builtin_inff() ? 0.0f : top;
    const float total = exponentials<F32>(row, n.prefix + seen.count, safe, nullptr);
    gradient_row(row, s.dscores + r * n.stride, n.prefix + seen.count, total == 0.0f ? 0.0f : 1.0f / total);
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
    const Keys prefix = prefix_keys(x, b, g, n, true, rest), keys = carve_keys(rest, n, x.keys, x.head_dim, true);
    const Sums dkeys = carve_sums(rest, x.keys, n.width);
    const Block block = carve_block(rest, n, x.keys);
    pack_keys<T, T>(x.k, x.v, b, g, 0, x.keys, n, x.head_dim, keys, rest);
    for (int64_t i = 0; i < x.rows(); i += kRowBlock)
      backward_block(x, n, b, g, i, x.rows() - i < kRowBlock ? x.rows() - i : kRowBlock, prefix, keys, dprefix, dkeys,
                     block);
    for (int64_t j = 0; j < x.keys; ++j) {
      write_row<T>(row_of<T>(x.dk, b, g, j), x.head_dim, x.scale, dkeys.k + j * n.width);
      write_row<T>(row_of<T>(x.dv, b, g, j), x.head_dim, 1.0f, dkeys.v + j * n.width);
    }
  }
  if (!x.shared) write_prefix(x, b0, g, dprefix.k, 1, 0, scratch.floats(n.width));
}

// --- what prefix_attention.cpp calls ----------------------------------------------------------------------------------

inline void prefix_attention_pack(const PrefixAttentionArgs& x, int64_t g, bool backward, uint32_t* packed,
                                  uint32_t* scratch) {
  with_type(x.type, [&](auto type) {
    using T = decltype(type);
    const Sizes<T> n(x);
    Carver to{packed + g * 3 * operand_words(x.prefix, x.head_dim)};
    pack_prefix(x, 0, g, n, carve_keys(to, n, x.prefix, x.head_dim, backward), Carver{scratch});
  });
}

inline void prefix_attention_forward_task(const PrefixAttentionArgs& x, int64_t b, int64_t g, int64_t row0,
                                          int64_t row1, uint32_t* scratch) {
  with_type(x.type, [&](auto type) { forward_rows<decltype(type)>(x, b, g, row0, row1, Carver{scratch}); });
}

inline void prefix_attention_backward_task(const PrefixAttentionArgs& x, int64_t b0, int64_t b1, int64_t g,
                                           float* shares, uint32_t* scratch) {
  with_type(x.type, [&](auto type) { backward_batch<decltype(type)>(x, b0, b1, g, shares, Carver{scratch}); });
}

inline void prefix_attention_write_prefix(const PrefixAttentionArgs& x, int64_t g, const float* sums, int64_t chunks,
                                          int64_t step, float* row) {
  write_prefix(x, 0, g, sums, chunks, step, row);
}

#include "cpu/prefix_attention_few.inl"
