// Attention over a prefix and real keys. Included once per instruction set; the maths is in
// peft_engine/ops/prefix_attention.py. A row of the batch is computed in the same steps whatever stands beside it.
#include "cpu/attention_tiles.inl"
#include "cpu/activation.inl"
#include "cpu/dropout_mask.inl"

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

// Where they may start: at the scalar level panels are narrower than the 16 to which keys are padded.
constexpr int64_t kSeenUnit = kPanel < 16 ? 16 : kPanel;

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

// Products to scores: scaled, capped, with the bias, -inf outside of [first, last). Where they are capped, `slopes`, if
// there is one, gets their derivatives by what was capped.
inline Floats score_part(const PrefixAttentionArgs& x, float* row, int64_t count, int64_t first, int64_t last,
                         const float* bias, Floats most, float* slopes = nullptr) {
  const bool capped = x.softcap > 0.0f;
  const float inverse = 1.0f / x.softcap;
  for (int64_t j = 0; j < count; j += kWidth) {
    Floats v = load<F32>(row + j) * x.scale;
    if (capped) {
      const Floats t = Tanh::value(v * inverse);
      if (slopes != nullptr) store<F32>(slopes + j, 1.0f - t * t);
      v = t * x.softcap;
    }
    if (bias != nullptr) v += load<F32>(bias + j);
    if (j < first || j + kWidth > last) v = select(inside(j, first, last), v, all(-__builtin_inff()));
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

// The dropout of one row of scores: `prefix` columns, the real keys from `first_key` on behind them.
struct DroppedRow {
  Dropout dropout;
  uint32_t key;
  int64_t prefix, shift;  // from a place behind the prefix's columns to its column of [prefix ; keys]

  DroppedRow(const PrefixAttentionArgs& x, int64_t b, int64_t h, int64_t t, int64_t prefix, int64_t first_key)
      : dropout(dropout_of(x)),
        key(dropout.row_key((b * x.heads + h) * x.queries + t)),
        prefix(prefix),
        shift(x.prefix + first_key - prefix) {}

  PE_INLINE Ints keep(int64_t j) const { return dropout.keep_vector(key, j < prefix ? j : j + shift); }
};

// exponentials, of which what dropout takes is zero; their sum is that of all.
template <class T>
inline float dropped_exponentials(float* row, int64_t count, float top, const DroppedRow& dropped, uint32_t* pairs) {
  Floats total = {};
  for (int64_t j = 0; j < count; j += kWidth) {
    const Floats e = exponential_below(load<F32>(row + j) - top);
    const Floats kept = (Floats)((Ints)e & dropped.keep(j));
    if constexpr (kPerWord<T> == 2) store<Bf16>(reinterpret_cast<uint16_t*>(pairs) + j, kept);
    else store<F32>(row + j, kept);
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
    seen = seen_by(x, b, i / group, (i + rows - 1) / group + 1, origin, kSeenUnit);
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
      Floats most = score_part(x, row, n.prefix, 0, x.prefix, nullptr, all(-__builtin_inff()));
      most = score_part(x, real, seen.count, x.first_key(b, t) - at, x.last_key(b, t) - at,
                        bias_of(x, b, h, t, at, seen.count, bias), most);
      const float top = largest(most), safe = top == -__builtin_inff() ? 0.0f : top;
      uint32_t* to = pairs + r * n.stride / 2;
      float total;
      if (x.dropout_p > 0.0f) {
        const DroppedRow dropped(x, b, h, t, n.prefix, at);
        total = dropped_exponentials<T>(row, n.prefix + seen.count, safe, dropped, to);
        inverse[r] = total == 0.0f ? 0.0f : dropped.dropout.scale / total;
      } else {
        total = exponentials<T>(row, n.prefix + seen.count, safe, to);
        inverse[r] = total == 0.0f ? 0.0f : 1.0f / total;
      }
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

#include "cpu/prefix_attention_backward.inl"

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

// A segment where there is no prefix.
inline void prefix_attention_backward_segment(const PrefixAttentionArgs& x, const Segment& s, int64_t g,
                                              uint32_t* scratch) {
  with_type(x.type, [&](auto type) {
    using T = decltype(type);
    const Sizes<T> n(x);
    Carver from{scratch};
    const Keys prefix = carve_keys(from, n, 0, x.head_dim, true);
    backward_segment(x, n, s, g, prefix, carve_sums(from, 0, n.width), from);
  });
}

inline void prefix_attention_write_prefix(const PrefixAttentionArgs& x, int64_t g, const float* sums, int64_t chunks,
                                          int64_t step, float* row) {
  write_prefix(x, 0, g, sums, chunks, step, row);
}

#include "cpu/prefix_attention_few.inl"
