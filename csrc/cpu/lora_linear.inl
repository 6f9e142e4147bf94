// lora_linear forward and backward. Included once per instruction set; see product.inl for how a product runs.
//
// The adapter joins the base product as more terms of the same contraction: y = [x | h] [W | s B]^T, dx = [dy | dh] [W ; A].
// Where products are of bf16 pairs, fp32 operands are split into bf16 terms v = v1 + v2 + v3 of 8 bits each: three for
// what leaves as fp32 (h, dh, dA, dB), and v1 w1 + v2 w1 + v1 w2 for what is rounded to bf16 afterwards.

#include "cpu/panels.inl"
#include "cpu/product.inl"
#include "cpu/adapter.inl"
#include "cpu/outer.inl"
#include "cpu/few_rows.inl"

// The adapter's h = x A^T for a few rows, in floats, and what it and the bias add to y.
inline Extra extra_of_few_rows(const LoraLinearForward& f) {
  Extra extra;
  extra.bias = f.bias;
  extra.bias_type = f.bias_type;
  const int64_t k = f.w.cols, rank = f.adapter.rank, padded = (k + 63) / 64 * 64;
  if (rank == 0) return extra;
  const int rows = static_cast<int>(f.rows);
  Source x = dense(f.x, f.type, f.rows, k);
  x.dropout = dropout_of(f.adapter);
  float* wide = scratch<float>(Slot::dropped, rows * padded);
  for (int m = 0; m < rows; ++m)
    for (int64_t c = 0; c < padded; c += 64) read64(x, m, c, wide + m * padded + c);
  extra.rank = rank;
  extra.stride = (rank + 15) / 16 * 16;
  extra.b = dense(f.adapter.b, f.adapter.type, f.w.rows, rank).m;
  float* scaled = scratch<float>(Slot::adapter, rows * extra.stride);
  extra.h = scaled;
  memset(scaled, 0, static_cast<size_t>(rows * extra.stride) * sizeof(float));
  const Source a = dense(f.adapter.a, f.adapter.type, rank, k);
  in_parallel(rank, rank * k * rows >= kWorthThreads, [&](int64_t begin, int64_t end) {
    float v[64];
    for (int64_t r = begin; r < end; ++r) {
      float lanes[16][16] = {};
      for (int64_t c = 0; c < k; c += 64) {
        read64(a, r, c, v);
        for (int m = 0; m < rows; ++m) add_dot64(wide + m * padded + c, v, lanes[m]);
      }
      for (int m = 0; m < rows; ++m) {
        const float h = sum16(lanes[m]) * x.dropout.scale;
        f.h[m * rank + r] = h;
        scaled[m * extra.stride + r] = h * f.adapter.scaling;
      }
    }
  });
  return extra;
}

#if PE_LEVEL >= 4
// Up to 16 rows of bf16 against an NF4 weight whose rows are whole blocks: one tile of activations.
inline void forward_one_tile(const LoraLinearForward& f, int64_t threads) {
  Segment base;
  base.w.m = f.w;
  base.interleaved = true;
  base.steps = steps_for<true>(f.w.cols, true);
  uint32_t* act = scratch<uint32_t>(Slot::activations, base.steps * kTile);
  base.act[0] = act;
  Out y;
  y.data = f.y;
  y.type = f.type;
  y.rows = f.rows;
  y.cols = f.w.rows;
  y.transposed = true;
  y.extra = extra_of_few_rows(f);
  right_panel_of_rows<true>(dense(f.x, f.type, f.rows, f.w.cols), true, 0, 1, 0, base.steps, act);
  const bool worth = f.w.rows * f.w.cols >= kWorthThreads;
  const Plan plan(f.w.rows, 1, worth ? threads : 1, 4, false);
  in_parallel(plan.tasks(), worth, [&](int64_t begin, int64_t end) {
    const TileUnit unit;
    for (int64_t task = begin; task < end; ++task)
      run_task<true, Panel::rows_left>(plan, task, &base, 1, 0, Dropout(), y);
  });
}
#endif

template <bool kPairs>
inline void forward_few_rows(const LoraLinearForward& f) {
  const int64_t k = f.w.cols, padded = (k + 127) / 128 * 128;
  const int rows = static_cast<int>(f.rows);
  Source x = dense(f.x, f.type, f.rows, k), w;
  w.m = f.w;
  const Extra extra = extra_of_few_rows(f);
  const Take take = few_rows_take<kPairs>(f.w);
  const bool pairs = take == Take::bf16 || take == Take::interleaved;
  void* activations = scratch<float>(Slot::activations, rows * padded);
  for (int m = 0; m < rows; ++m) {
    for (int64_t c = 0; c < padded; c += 128) {
      const int64_t at = m * padded + c;
#if PE_LEVEL >= 3
      if (pairs) {
        __m512i v[4];
        read64_bf16(x, m, c, &v[0], &v[1]);
        read64_bf16(x, m, c + 64, &v[2], &v[3]);
        if (take == Take::interleaved) interleave128(v);
        for (int q = 0; q < 4; ++q) _mm512_storeu_si512(static_cast<uint16_t*>(activations) + at + 32 * q, v[q]);
        continue;
      }
#endif
      float v[128], *to = static_cast<float*>(activations) + at;
      for (int part = 0; part < 128; part += 64) read64(x, m, c + part, v + part);
#if PE_LEVEL >= 1
      if (take == Take::by_lookup) {
        by_lookup128(v, to);
        continue;
      }
#endif
      memcpy(to, v, sizeof v);
    }
  }
  constexpr int kWeightRows = 8;
  const int64_t word = pairs ? 2 : 4;
  // One row of 576x576: 23 us on one thread of a Zen 4, 16 on two.
  in_parallel(f.w.rows, rows * f.w.rows * k >= kWorthThreads / 2, [&](int64_t begin, int64_t end) {
    // The weight's rows a few at a time, so that the second four rows of x find them in the L1 cache.
    for (int64_t n = begin; n < end; n += kWeightRows) {
      for (int m = 0; m < rows; m += kRowsAtOnce) {
        Extra part = extra;
        part.h = extra.h == nullptr ? nullptr : extra.h + m * extra.stride;
        few_rows(static_cast<const char*>(activations) + m * padded * word, padded, take,
                 rows - m < kRowsAtOnce ? rows - m : kRowsAtOnce, w, n, n + kWeightRows < end ? n + kWeightRows : end,
                 part, f.type, static_cast<char*>(f.y) + m * f.w.rows * (f.type == Type::f32 ? 4 : 2));
      }
    }
  });
}

template <bool kPairs, Panel kPanel>
inline void forward_panels(const LoraLinearForward& f, int64_t threads, int64_t most_tiles) {
  constexpr bool kUnit = kTileUnit<kPairs>, kActsRight = kPanel == Panel::rows_left;
  const int64_t k = f.w.cols, n = f.w.rows, rank = f.adapter.rank;
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
    uint16_t* b = scratch<uint16_t>(Slot::transposed, aligned(3 * rank * n) + 3 * rank * kChunkRows);
    in_parallel(n, worth, [&](int64_t begin, int64_t end) {
      if (kUnit) widen_rows(f.adapter.b, f.adapter.type, begin, end, rank, f.adapter.scaling, false, b);
      else
        scaled_floats(f.adapter.b, f.adapter.type, begin * rank, end * rank, f.adapter.scaling,
                      reinterpret_cast<float*>(b));
    });
    wide_h = b + aligned(3 * rank * n);
    product[1].floats = !kUnit;
    product[1].w = kUnit ? dense(b, Type::bf16, n, 3 * rank) : dense(b, Type::f32, n, rank);
    product[1].steps = kUnit ? steps_for<true>(3 * rank, false) : (rank + 15) / 16;
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
  y.transposed = kActsRight;
  y.extra.bias = f.bias;
  y.extra.bias_type = f.bias_type;
  h.data = f.h;
  h.rows = f.rows;
  h.cols = rank;
  h.transposed = kActsRight;
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
    const auto lay_out = [&](const Source& s, int64_t begin, int64_t end, uint32_t* to) {
      to += begin * x_words;
      if constexpr (kActsRight)
        right_panel_of_rows<kPairs>(s, interleaved, row0 + 16 * begin, end - begin, 0, product[0].steps, to);
      else left_panel<kPairs>(s, interleaved, row0 + 16 * begin, end - begin, 0, product[0].steps, to);
    };
    in_parallel(tiles, worth, [&](int64_t begin, int64_t end) {
      const TileUnit unit;
      lay_out(x, begin, end, act);
      if (rank == 0) return;
      if (dropout.on) lay_out(dropped, begin, end, act_dropped);
      product_task<kPairs, kPanel>(down, a.count, 0, (rank + 15) / 16, begin, end, row0, kBlockSteps, dropout, h);
      uint32_t* to = act_h + begin * h_words;
      if constexpr (kUnit) {
        const int64_t last = 16 * end < rows ? 16 * end : rows;
        widen_rows(f.h + row0 * rank, Type::f32, 16 * begin, last, rank, 1.0f, true, wide_h);
        right_panel_of_rows<true>(dense(wide_h, Type::bf16, rows, 3 * rank), false, 16 * begin, end - begin, 0,
                                  product[1].steps, to);
      } else {
        const Source of_h = dense(f.h, Type::f32, f.rows, rank);
        if constexpr (kActsRight)
          right_panel_of_rows<false>(of_h, false, row0 + 16 * begin, end - begin, 0, product[1].steps, to);
        else left_panel<false>(of_h, false, row0 + 16 * begin, end - begin, 0, product[1].steps, to);
      }
    });
    const Plan plan(n, tiles, threads, most_tiles, false);
    in_parallel(plan.tasks(), worth, [&](int64_t begin, int64_t end) {
      const TileUnit unit;
      for (int64_t task = begin; task < end; ++task)
        run_task<kPairs, kPanel>(plan, task, product, rank > 0 ? 2 : 1, row0, dropout, y);
    });
  }
}

// One operand of the tile products is turned: the activations, and the result with them, or the weight, which costs the
// less the more rows there are. The sums are the same to the bit. The tile unit reads a weight's rows as they are.
template <bool kPairs>
inline void forward_panels(const LoraLinearForward& f, int64_t threads, int64_t most_tiles) {
  const int64_t steps = steps_for<kPairs>(f.w.cols, false), panels = (f.w.rows + 15) / 16, rows = f.rows;
  const int64_t acts = ((rows < kChunkRows ? rows : kChunkRows) + 15) / 16;
  // In tiles turned; one of the result takes half as long again, with its rows' stores.
  const bool weight = !kTileUnit<kPairs> && 2 * panels * steps < acts * (2 * steps + 3 * panels);
  if (weight) forward_panels<kPairs, Panel::rows_right>(f, threads, most_tiles);
  else forward_panels<kPairs, Panel::rows_left>(f, threads, most_tiles);
}

// dA = dh^T drop(x) and dB = s dy^T h, or one of them.
template <bool kPairs>
inline void backward_adapter(const LoraLinearBackward& f, const float* dh, int64_t threads, int64_t most_tiles) {
  constexpr bool kUnit = kTileUnit<kPairs>;
  const int64_t k = f.w.cols, n = f.w.rows, rank = f.adapter.rank, tiles = (rank + 15) / 16;
  const Dropout dropout = dropout_of(f.adapter);
  Source x = dense(f.x, f.type, f.rows, k), dy = dense(f.dy, f.type, f.rows, n);
  x.dropout = dropout;
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
  const bool a = f.da != nullptr, b = f.db != nullptr;
  const bool worth = rank * f.rows * ((a ? k : 0) + (b ? n : 0)) >= kWorthThreads;
  if (!worth) threads = 1;
  if constexpr (!kUnit) {
    const int64_t size = 16 * tiles * f.rows, x_tiles = a ? (k + 15) / 16 : 0;
    const int64_t all = x_tiles + (b ? (n + 15) / 16 : 0);
    float* blocks = scratch<float>(Slot::activations, 2 * size);
    const float* of_x = a ? in_blocks_of_16(dh, f.rows, rank, blocks) : nullptr;
    const float* of_dy = b ? in_blocks_of_16(f.h, f.rows, rank, blocks + size) : nullptr;
    // By fours, which share cache lines of half precision, and the hashes of a dropout.
    in_parallel((all + 3) / 4, worth, [&](int64_t begin, int64_t end) {
      const int64_t first = 4 * begin, last = 4 * end < all ? 4 * end : all;
      if (first < x_tiles) outer_columns(of_x, rank, x, first, last < x_tiles ? last : x_tiles, da);
      if (last > x_tiles) outer_columns(of_dy, rank, dy, first > x_tiles ? first - x_tiles : 0, last - x_tiles, db);
    });
    return;
  }
  const int64_t steps = steps_for<kPairs>(f.rows, false), words = tiles * steps * kTile;
  uint32_t* act = scratch<uint32_t>(Slot::activations, 6 * words);
  Segment segments[2];
  for (int which = a ? 0 : 1; which < (b ? 2 : 1); ++which) {
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
  segments[0].w = x;
  segments[1].w = dy;
  const Plan a_plan(k, tiles, threads, most_tiles, true), b_plan(n, tiles, threads, most_tiles, true);
  const int64_t a_tasks = a ? a_plan.tasks() : 0, b_tasks = b ? b_plan.tasks() : 0;
  in_parallel(a_tasks + b_tasks, worth, [&](int64_t begin, int64_t end) {
    const TileUnit unit;
    for (int64_t task = begin; task < end; ++task) {
      if (task < a_tasks) run_task<kPairs, Panel::columns_right>(a_plan, task, &segments[0], 1, 0, dropout, da);
      else run_task<kPairs, Panel::columns_right>(b_plan, task - a_tasks, &segments[1], 1, 0, dropout, db);
    }
  });
}

template <bool kPairs>
inline void backward_panels(const LoraLinearBackward& f, int64_t threads, int64_t most_tiles) {
  constexpr bool kUnit = kTileUnit<kPairs>;
  if (f.dx == nullptr && f.da == nullptr) {  // dB is of h alone
    if (f.db != nullptr) backward_adapter<kPairs>(f, nullptr, threads, most_tiles);
    return;
  }
  const int64_t k = f.w.cols, n = f.w.rows, rank = f.adapter.rank;
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
    const Source a = dense(f.adapter.a, f.adapter.type, rank, k);
    if (f.dx != nullptr) product[0].w = kUnit ? widen_columns(a, worth, wide_a) : a;
    product[0].floats = !kUnit;
    product[0].steps = kUnit ? steps_for<true>(3 * rank, false) : (rank + 15) / 16;
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
      product_task<kPairs, Panel::columns_right>(up, b.count, 0, (rank + 15) / 16, begin, end, row0, kBlockSteps,
                                                 dropout, to_dh);
      if (f.dx == nullptr) return;
      uint32_t* to = act_h + begin * h_words;
      if constexpr (kUnit) {
        const int64_t last = 16 * end < rows ? 16 * end : rows;
        widen_rows(dh + row0 * rank, Type::f32, 16 * begin, last, rank, 1.0f, true, wide_dh);
        left_panel<true>(dense(wide_dh, Type::bf16, rows, 3 * rank), false, 16 * begin, end - begin, 0,
                         product[0].steps, to);
      } else {
        left_panel<false>(dense(dh, Type::f32, f.rows, rank), false, row0 + 16 * begin, end - begin, 0,
                          product[0].steps, to);
      }
    });
    if (f.dx == nullptr) continue;
    const Plan plan(k, tiles, threads, most_tiles, true);
    in_parallel(plan.tasks(), worth, [&](int64_t begin, int64_t end) {
      const TileUnit unit;
      for (int64_t task = begin; task < end; ++task)
        run_task<kPairs, Panel::columns_right>(plan, task, product + first, 2 - first, row0, dropout, dx);
    });
  }
  if (f.da != nullptr || f.db != nullptr) backward_adapter<kPairs>(f, dh, all_threads, most_tiles);
}

inline void lora_linear_forward(const LoraLinearForward& f, int64_t threads, int64_t most_tiles) {
#if PE_LEVEL >= 3
  if (f.type == Type::bf16) {
#if PE_LEVEL >= 4
    if (f.rows > 3 && f.rows <= 16 && can_interleave<true>(f.w)) {
      forward_one_tile(f, threads);
      return;
    }
#endif
    if (f.rows <= most_few_rows<true>(f.w)) forward_few_rows<true>(f);
    else forward_panels<true>(f, threads, most_tiles);
    return;
  }
#endif
  if (f.rows <= most_few_rows<false>(f.w)) forward_few_rows<false>(f);
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
