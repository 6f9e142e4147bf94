// lora_linear forward and backward. Included once per instruction set; see product.inl for how a product runs.
//
// The adapter joins the base product as more terms of the same contraction: y = [x | h] [W | s B]^T, dx = [dy | dh] [W ; A].
// Where products are of bf16 pairs, fp32 operands are split into bf16 terms v = v1 + v2 + v3 of 8 bits each: three for
// what leaves as fp32 (h, dh, dA, dB), and v1 w1 + v2 w1 + v1 w2 for what is rounded to bf16 afterwards.

#include "cpu/panels.inl"
#include "cpu/product.inl"
#include "cpu/few_rows.inl"

template <class F>
inline void in_parallel(int64_t n, bool worth_it, const F& f) {
  if (worth_it) torch::stable::parallel_for(0, n, 1, f);
  else if (n > 0) f(0, n);
}

inline Source dense(const void* data, Type type, int64_t rows, int64_t cols) {
  Source s;
  s.m.data = data;
  s.m.type = type;
  s.m.rows = rows;
  s.m.cols = cols;
  return s;
}

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

// Columns the adapter adds to a contraction.
template <bool kPairs>
inline int64_t wide_rank(int64_t rank) {
  return kPairs ? 3 * rank : rank;
}

// Rows of an (n, rank) matrix times `factor` as those columns: [v1 | v2 | v1] beside [w1 | w1 | w2] of the other operand.
template <bool kPairs>
inline void widen_rows(const void* data, Type type, int64_t row0, int64_t row1, int64_t rank, float factor, bool first,
                       void* out) {
  const Source s = dense(data, type, row1, rank);
  for (int64_t n = row0; n < row1; ++n) {
    if constexpr (!kPairs) {
      for (int64_t r = 0; r < rank; ++r)
        static_cast<float*>(out)[n * rank + r] = load_one(data, type, n * rank + r) * factor;
      continue;
    }
    uint16_t* to = static_cast<uint16_t*>(out) + n * 3 * rank;
    uint16_t* const parts[2] = {to, to + (first ? 1 : 2) * rank};
    bf16_terms(s.m, n * rank, rank, factor, 2, parts);
    memcpy(to + (first ? 2 : 1) * rank, to, static_cast<size_t>(rank) * 2);
  }
}

// (rank, cols) as more rows of the contraction: [w1 ; w1 ; w2].
template <bool kPairs>
inline Source widen_columns(const Source& a, bool threads, uint16_t* to) {
  if constexpr (!kPairs) return a;
  const int64_t n = a.m.rows * a.m.cols;
  in_parallel(a.m.rows, threads, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * a.m.cols, count = (end - begin) * a.m.cols;
    uint16_t* const parts[2] = {to + at, to + 2 * n + at};
    bf16_terms(a.m, at, count, 1.0f, 2, parts);
    memcpy(to + n + at, to + at, static_cast<size_t>(count) * 2);
  });
  return dense(to, Type::bf16, 3 * a.m.rows, a.m.cols);
}

// The transpose of a (rows, cols) matrix of floats.
inline Source transposed(const float* data, int64_t rows, int64_t cols, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) out[c * rows + r] = data[r * cols + c];
  return dense(out, Type::f32, cols, rows);
}

inline Dropout dropout_of(const Adapter& adapter) {
  Dropout d;
  d.on = adapter.dropout_p > 0.0f;
  if (d.on) {
    d.threshold = adapter.threshold;
    d.seed = adapter.seed;
    d.scale = 1.0f / (1.0f - adapter.dropout_p);
  }
  return d;
}

// A count of 16-bit values up to a whole number of cache lines.
constexpr int64_t aligned(int64_t n) { return (n + 31) / 32 * 32; }

constexpr Type kWord[2] = {Type::f32, Type::bf16};

// A product of fewer multiplications than this is not worth waking a second thread.
constexpr int64_t kWorthThreads = 1 << 19;

template <bool kPairs>
inline void forward_few_rows(const LoraLinearForward& f) {
  const int64_t k = f.w.cols, rank = f.adapter.rank, padded = (k + 127) / 128 * 128, wide_rank = (rank + 15) / 16 * 16;
  const int rows = static_cast<int>(f.rows);
  Source x = dense(f.x, f.type, f.rows, k), w;
  w.m = f.w;
  const Dropout dropout = dropout_of(f.adapter);
  Extra extra;
  if (rank > 0) {
    x.dropout = dropout;
    float* wide = scratch<float>(Slot::dropped, rows * padded);
    for (int m = 0; m < rows; ++m)
      for (int64_t c = 0; c < padded; c += 64) read64(x, m, c, wide + m * padded + c);
    x.dropout = Dropout();
    float* scaled = scratch<float>(Slot::adapter, rows * wide_rank);
    memset(scaled, 0, static_cast<size_t>(rows * wide_rank) * sizeof(float));
    const Source a = dense(f.adapter.a, f.adapter.type, rank, k);
    in_parallel(rank, rank * k * rows >= kWorthThreads, [&](int64_t begin, int64_t end) {
      float v[64];
      for (int64_t r = begin; r < end; ++r) {
        float lanes[kMostFewRows][16] = {};
        for (int64_t c = 0; c < k; c += 64) {
          read64(a, r, c, v);
          for (int m = 0; m < rows; ++m) add_dot64(wide + m * padded + c, v, lanes[m]);
        }
        for (int m = 0; m < rows; ++m) {
          const float h = sum16(lanes[m]) * dropout.scale;
          f.h[m * rank + r] = h;
          scaled[m * wide_rank + r] = h * f.adapter.scaling;
        }
      }
    });
    extra.h = scaled;
    extra.stride = wide_rank;
    extra.rank = rank;
    extra.b = dense(f.adapter.b, f.adapter.type, f.w.rows, rank).m;
  }
  extra.bias = f.bias;
  extra.bias_type = f.bias_type;
  const Take take = few_rows_take<kPairs>(f.w);
  void* activations = scratch<float>(Slot::activations, rows * padded);
  for (int m = 0; m < rows; ++m) {
    for (int64_t c = 0; c < padded; c += 128) {
      const int64_t at = m * padded + c;
#if PE_LEVEL >= 3
      if (take == Take::bf16) {
        __m512i v[4];
        read64_bf16(x, m, c, &v[0], &v[1]);
        read64_bf16(x, m, c + 64, &v[2], &v[3]);
        for (int q = 0; q < 4; ++q) _mm512_storeu_si512(static_cast<uint16_t*>(activations) + at + 32 * q, v[q]);
        continue;
      }
#endif
      float v[128], *to = static_cast<float*>(activations) + at;
      for (int part = 0; part < 128; part += 64) read64(x, m, c + part, v + part);
#if PE_LEVEL >= 2
      if (take == Take::by_shift) {
        by_shift128(v, to);
        continue;
      }
#endif
      memcpy(to, v, sizeof v);
    }
  }
  constexpr int kWeightRows = 8;
  const int64_t word = take == Take::bf16 ? 2 : 4;
  in_parallel(f.w.rows, f.w.rows * k >= kWorthThreads, [&](int64_t begin, int64_t end) {
    // The weight's rows a few at a time, so that the second four rows of x find them in the L1 cache.
    for (int64_t n = begin; n < end; n += kWeightRows) {
      for (int m = 0; m < rows; m += kRowsAtOnce) {
        Extra part = extra;
        part.h = extra.h == nullptr ? nullptr : extra.h + m * wide_rank;
        few_rows(static_cast<const char*>(activations) + m * padded * word, padded, take,
                 rows - m < kRowsAtOnce ? rows - m : kRowsAtOnce, w, n, n + kWeightRows < end ? n + kWeightRows : end,
                 part, f.type, static_cast<char*>(f.y) + m * f.w.rows * (f.type == Type::f32 ? 4 : 2));
      }
    }
  });
}

template <bool kPairs>
inline void forward_panels(const LoraLinearForward& f, int64_t threads, int64_t most_tiles) {
  const int64_t k = f.w.cols, n = f.w.rows, rank = f.adapter.rank, wide = wide_rank<kPairs>(rank);
  const bool interleaved = can_interleave<kPairs>(f.w), worth = f.rows * n * k >= kWorthThreads;
  if (!worth) threads = 1;
  const Dropout dropout = dropout_of(f.adapter);
  Source x = dense(f.x, f.type, f.rows, k), dropped = x;
  dropped.dropout = dropout;

  Segment product[2], down[3];
  Terms a;
  uint16_t* wide_h = nullptr;
  if (rank > 0) {
    a = split<kPairs>(dense(f.adapter.a, f.adapter.type, rank, k), worth,
                      scratch<uint16_t>(Slot::adapter, 3 * rank * k));
    uint16_t* wide_b = scratch<uint16_t>(Slot::transposed, aligned(3 * rank * n) + 3 * rank * kChunkRows);
    wide_h = wide_b + aligned(3 * rank * n);
    in_parallel(n, worth, [&](int64_t begin, int64_t end) {
      widen_rows<kPairs>(f.adapter.b, f.adapter.type, begin, end, rank, f.adapter.scaling, false, wide_b);
    });
    product[1].w = dense(wide_b, kWord[kPairs], n, wide);
    product[1].steps = steps_for<kPairs>(wide, false);
  }
  product[0].w.m = f.w;
  product[0].interleaved = interleaved;
  product[0].steps = steps_for<kPairs>(k, interleaved);
  for (int t = 0; t < a.count; ++t) {
    down[t].w = a.term[t];
    down[t].interleaved = interleaved;
    down[t].steps = product[0].steps;
  }
  Out y, h;
  y.data = f.y;
  y.type = f.type;
  y.rows = f.rows;
  y.cols = n;
  y.transposed = true;
  y.bias = f.bias;
  y.bias_type = f.bias_type;
  h.data = f.h;
  h.rows = f.rows;
  h.cols = rank;
  h.transposed = true;
  h.scale = dropout.scale;

  for (int64_t row0 = 0; row0 < f.rows; row0 += kChunkRows) {
    const int64_t rows = f.rows - row0 < kChunkRows ? f.rows - row0 : kChunkRows, tiles = (rows + 15) / 16;
    const int64_t x_words = product[0].steps * kTile, h_words = product[1].steps * kTile;
    uint32_t* act = scratch<uint32_t>(Slot::activations, tiles * (x_words + h_words));
    uint32_t* act_dropped = dropout.on ? scratch<uint32_t>(Slot::dropped, tiles * x_words) : act;
    uint32_t* act_h = act + tiles * x_words;
    product[0].act[0] = act;
    product[1].act[0] = act_h;
    for (int t = 0; t < a.count; ++t) down[t].act[0] = act_dropped;
    in_parallel(tiles, worth, [&](int64_t begin, int64_t end) {
      const TileUnit unit;
      right_panel_of_rows<kPairs>(x, interleaved, row0 + 16 * begin, end - begin, 0, product[0].steps,
                                  act + begin * x_words);
      if (rank == 0) return;
      if (dropout.on)
        right_panel_of_rows<kPairs>(dropped, interleaved, row0 + 16 * begin, end - begin, 0, product[0].steps,
                                    act_dropped + begin * x_words);
      product_task<kPairs, true>(down, a.count, 0, (rank + 15) / 16, begin, end, row0, kBlockSteps, dropout, h);
      const int64_t last = 16 * end < rows ? 16 * end : rows;
      widen_rows<kPairs>(f.h + row0 * rank, Type::f32, 16 * begin, last, rank, 1.0f, true, wide_h);
      right_panel_of_rows<kPairs>(dense(wide_h, kWord[kPairs], rows, wide), false, 16 * begin, end - begin, 0,
                                  product[1].steps, act_h + begin * h_words);
    });
    const Plan plan(n, tiles, threads, most_tiles, false);
    in_parallel(plan.tasks(), worth, [&](int64_t begin, int64_t end) {
      const TileUnit unit;
      for (int64_t task = begin; task < end; ++task)
        run_task<kPairs, true>(plan, task, product, rank > 0 ? 2 : 1, row0, dropout, y);
    });
  }
}

template <bool kPairs>
inline void backward_adapter(const LoraLinearBackward& f, const float* dh, int64_t threads, int64_t most_tiles) {
  const int64_t k = f.w.cols, n = f.w.rows, rank = f.adapter.rank, steps = steps_for<kPairs>(f.rows, false),
                tiles = (rank + 15) / 16;
  const Dropout dropout = dropout_of(f.adapter);
  const int64_t words = tiles * steps * kTile;
  uint32_t* act = scratch<uint32_t>(Slot::activations, 6 * words);
  Segment segments[2];
  for (int which = 0; which < 2; ++which) {
    float* turned = scratch<float>(Slot::transposed, rank * f.rows * 3);
    const Terms t = split<kPairs>(transposed(which == 0 ? dh : f.h, f.rows, rank, turned), false,
                                  reinterpret_cast<uint16_t*>(turned + rank * f.rows));
    Segment& s = segments[which];
    s.acts = t.count;
    s.steps = steps;
    for (int i = 0; i < t.count; ++i) {
      uint32_t* to = act + (3 * which + i) * words;
      left_panel<kPairs>(t.term[i], false, 0, tiles, 0, steps, to);
      s.act[i] = to;
    }
  }
  segments[0].w = dense(f.x, f.type, f.rows, k);
  segments[0].w.dropout = dropout;
  segments[1].w = dense(f.dy, f.type, f.rows, n);
  Out da, db;
  da.data = f.da;
  db.data = f.db;
  da.type = db.type = f.adapter.type;
  da.rows = rank;
  da.cols = k;
  da.scale = dropout.scale;
  db.rows = n;
  db.cols = rank;
  db.transposed = true;
  db.scale = f.adapter.scaling;
  const bool worth = rank * f.rows * (n + k) >= kWorthThreads;
  if (!worth) threads = 1;
  const Plan a_plan(k, tiles, threads, most_tiles, true), b_plan(n, tiles, threads, most_tiles, true);
  in_parallel(a_plan.tasks() + b_plan.tasks(), worth, [&](int64_t begin, int64_t end) {
    const TileUnit unit;
    for (int64_t task = begin; task < end; ++task) {
      if (task < a_plan.tasks()) run_task<kPairs, false>(a_plan, task, &segments[0], 1, 0, dropout, da);
      else run_task<kPairs, false>(b_plan, task - a_plan.tasks(), &segments[1], 1, 0, dropout, db);
    }
  });
}

template <bool kPairs>
inline void backward_panels(const LoraLinearBackward& f, int64_t threads, int64_t most_tiles) {
  const int64_t k = f.w.cols, n = f.w.rows, rank = f.adapter.rank, wide = wide_rank<kPairs>(rank);
  const bool worth = f.rows * n * (f.dx == nullptr ? rank : k) >= kWorthThreads;
  const int64_t all_threads = threads;
  if (!worth) threads = 1;
  const Dropout dropout = dropout_of(f.adapter);
  const Source dy = dense(f.dy, f.type, f.rows, n);

  Segment product[2], up[3];
  Terms b;
  float* dh = nullptr;
  uint16_t* wide_dh = nullptr;
  int first = 1;  // product[1] is the base
  if (rank > 0) {
    first = 0;
    b = split<kPairs>(dense(f.adapter.b, f.adapter.type, n, rank), worth,
                      scratch<uint16_t>(Slot::adapter, 3 * rank * n));
    uint16_t* wide_a =
        scratch<uint16_t>(Slot::few_rows, aligned(3 * rank * k) + 3 * rank * kChunkRows + 2 * rank * f.rows);
    wide_dh = wide_a + aligned(3 * rank * k);
    dh = reinterpret_cast<float*>(wide_dh + 3 * rank * kChunkRows);  // 512 rows keep the alignment
    if (f.dx != nullptr)
      product[0].w = widen_columns<kPairs>(dense(f.adapter.a, f.adapter.type, rank, k), worth, wide_a);
    product[0].steps = steps_for<kPairs>(wide, false);
    product[0].then_mask = dropout.on;
  }
  product[1].w.m = f.w;
  product[1].steps = steps_for<kPairs>(n, false);
  for (int t = 0; t < b.count; ++t) {
    up[t].w = b.term[t];
    up[t].steps = product[1].steps;
  }
  Out dx, to_dh;
  dx.data = f.dx;
  dx.type = f.type;
  dx.rows = f.rows;
  dx.cols = k;
  to_dh.data = dh;
  to_dh.rows = f.rows;
  to_dh.cols = rank;
  to_dh.scale = f.adapter.scaling;

  for (int64_t row0 = 0; row0 < f.rows; row0 += kChunkRows) {
    const int64_t rows = f.rows - row0 < kChunkRows ? f.rows - row0 : kChunkRows, tiles = (rows + 15) / 16;
    const int64_t y_words = product[1].steps * kTile, h_words = product[0].steps * kTile;
    uint32_t* act = scratch<uint32_t>(Slot::activations, tiles * (y_words + h_words));
    uint32_t* act_h = act + tiles * y_words;
    product[1].act[0] = act;
    product[0].act[0] = act_h;
    for (int t = 0; t < b.count; ++t) up[t].act[0] = act;
    in_parallel(tiles, worth, [&](int64_t begin, int64_t end) {
      const TileUnit unit;
      left_panel<kPairs>(dy, false, row0 + 16 * begin, end - begin, 0, product[1].steps, act + begin * y_words);
      if (rank == 0) return;
      product_task<kPairs, false>(up, b.count, 0, (rank + 15) / 16, begin, end, row0, kBlockSteps, dropout, to_dh);
      if (f.dx == nullptr) return;
      const int64_t last = 16 * end < rows ? 16 * end : rows;
      widen_rows<kPairs>(dh + row0 * rank, Type::f32, 16 * begin, last, rank, 1.0f, true, wide_dh);
      left_panel<kPairs>(dense(wide_dh, kWord[kPairs], rows, wide), false, 16 * begin, end - begin, 0, product[0].steps,
                         act_h + begin * h_words);
    });
    if (f.dx == nullptr) continue;
    const Plan plan(k, tiles, threads, most_tiles, true);
    in_parallel(plan.tasks(), worth, [&](int64_t begin, int64_t end) {
      const TileUnit unit;
      for (int64_t task = begin; task < end; ++task)
        run_task<kPairs, false>(plan, task, product + first, 2 - first, row0, dropout, dx);
    });
  }
  if (f.da != nullptr) backward_adapter<kPairs>(f, dh, all_threads, most_tiles);
}

inline void lora_linear_forward(const LoraLinearForward& f, int64_t threads, int64_t most_tiles) {
#if PE_LEVEL >= 3
  if (f.type == Type::bf16) {
    if (f.rows <= kFewRowsOfPairs) forward_few_rows<true>(f);
    else forward_panels<true>(f, threads, most_tiles);
    return;
  }
#endif
  if (f.rows <= kMostFewRows) forward_few_rows<false>(f);
  else forward_panels<false>(f, threads, most_tiles);
}

inline void lora_linear_backward(const LoraLinearBackward& f, int64_t threads, int64_t most_tiles) {
#if PE_LEVEL >= 3
  if (f.type == Type::bf16) {
    backward_panels<true>(f, threads, most_tiles);
    return;
  }
#endif
  backward_panels<false>(f, threads, most_tiles);
}
