// bottleneck forward and backward as products of tiles (tiles.inl), the rest of the maths at the tiles' edges. Included
// once per instruction set.
//
// Floor: six products of rows x features x width multiplications. Beside them x and dy are laid out as tiles for the
// weights' gradients (float32 rows are left operands as they lie, others are laid out for that too), and the weights, once
// a call. Activation, bias, scaling, residual and their derivatives are done on the tiles that a product leaves in the
// cache; a group of rows goes through all products of a direction while it is there.
//
// An element is summed in the same order wherever its row stands, so a row of y is the same, bit for bit, in any batch
// of more than kFewRows rows, and so is every gradient for any number of threads. The forward of fewer rows:
// bottleneck_few.inl.

#include "cpu/panels.inl"
#include "cpu/activation.inl"

// Calls body(tag) with the tag of an activation.
template <class Body>
inline void with_activation(Activation activation, const Body& body) {
  if (activation == Activation::relu) {
    body(Relu{});
  } else if (activation == Activation::gelu) {
    body(Gelu{});
  } else if (activation == Activation::silu) {
    body(Silu{});
  } else {
    body(Tanh{});
  }
}

constexpr int64_t kBlock = 4;  // steps of a contraction that are laid out at a time: 16 KiB for two tiles of columns

// Tiles of 16 rows that share a pass over a weight. It depends on the rows alone: the norm's gradients are summed by
// these groups.
inline int64_t group_tiles(int64_t rows) { return rows > 256 ? 4 : 1; }

inline int64_t tiles_for(int64_t n) { return (n + 15) / 16; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Of one row a product still lays out the weight and multiplies four rows.
inline bool is_worth(int64_t rows, const BottleneckAdapter& a) {
  return (rows < 8 ? 8 : rows) * a.features * a.width >= kWorthThreads;
}

// How the result of a product, in tiles, is cut into tasks.
struct Cut {
  int64_t rows, columns, group, panel, groups, panels;

  Cut(int64_t rows, int64_t columns, int64_t group, int64_t widest, int64_t threads)
      : rows(rows), columns(columns), group(group) {
    groups = (rows + group - 1) / group;
    panels = (columns + widest - 1) / widest;
    if (groups > 0 && groups * panels < threads) panels = (threads + groups - 1) / groups;
    panel = ((columns + panels - 1) / panels + 1) / 2 * 2;  // columns of tiles are multiplied two at a time
    panels = (columns + panel - 1) / panel;
  }
  int64_t tasks() const { return groups * panels; }
};

struct Part {
  int64_t row, rows, column, columns;  // in tiles
};

inline Part part_of(const Cut& cut, int64_t task) {
  const int64_t row = task / cut.panels * cut.group, column = task % cut.panels * cut.panel;
  return {row, cut.rows - row < cut.group ? cut.rows - row : cut.group, column,
          cut.columns - column < cut.panel ? cut.columns - column : cut.panel};
}

// Tiles of an operand; those of one row or column of tiles are `stride` words from the next.
struct Tiles {
  uint32_t* data = nullptr;
  int64_t stride = 0;

  uint32_t* at(int64_t tile, int64_t step) const { return data + tile * stride + step * kTile; }
};

// A weight as right operand, whose rows (kOfRows) or columns are the product's columns. Where groups of rows share it, it
// is laid out beforehand; else `block` does it, for who multiplies.
template <bool kPairs, bool kOfRows>
struct Weight {
  Source source;
  int64_t steps = 0, columns = 0;  // the contraction's; the product's, in tiles
  Tiles tiles;

  Weight(const void* data, Type type, int64_t rows, int64_t cols) : source(dense(data, type, rows, cols)) {
    steps = steps_for<kPairs>(kOfRows ? cols : rows, false);
    columns = tiles_for(kOfRows ? rows : cols);
  }
  void lay_out(int64_t column, int64_t count, int64_t step, int64_t n, uint32_t* out) const {
    if constexpr (kOfRows) right_panel_of_rows<kPairs>(source, false, 16 * column, count, step, n, out);
    else right_panel<kPairs>(source, 16 * column, (count + 3) / 4 * 4, step, n, out);
  }
  void share(Slot slot) { tiles = {scratch<uint32_t>(slot, (columns + 3) / 4 * 4 * steps * kTile), steps * kTile}; }
  int64_t fours() const { return tiles.data == nullptr ? 0 : (columns + 3) / 4; }
  void share_four(int64_t four) const {
    lay_out(4 * four, kOfRows && columns < 4 * four + 4 ? columns - 4 * four : 4, 0, steps, tiles.at(4 * four, 0));
  }
  Tiles block(const Part& part, int64_t step, int64_t n) const {
    if (tiles.data != nullptr) return {tiles.at(part.column, step), tiles.stride};
    n = (n + 3) / 4 * 4;  // it is laid out by 64 values
    const Tiles out{scratch<uint32_t>(Slot::shared, (part.columns + 3) / 4 * 4 * n * kTile), n * kTile};
    lay_out(part.column, part.columns, step, n, out.data);
    return out;
  }
};

// Lays out what is shared of both weights, about as much by each thread.
template <class A, class B>
inline void share_weights(const A& a, const B& b, bool worth, int64_t threads) {
  const int64_t first = a.fours() * a.steps, total = first + b.fours() * b.steps;
  in_parallel(threads, worth, [&](int64_t begin, int64_t end) {
    const int64_t from = total * begin / threads, to = total * end / threads;
    for (int64_t i = 0; i < a.fours(); ++i)
      if (i * a.steps >= from && i * a.steps < to) a.share_four(i);
    for (int64_t i = 0; i < b.fours(); ++i)
      if (first + i * b.steps >= from && first + i * b.steps < to) b.share_four(i);
  });
}

// Rows that count in the last tile of a part.
inline int64_t last_used(const Part& part, int64_t rows) {
  const int64_t left = rows - 16 * (part.row + part.rows - 1);
  return left < 16 ? left : 16;
}

// Steps [step, step + n) of the part's rows x right.
template <bool kPairs>
inline void multiply_part(const Source& rows, const Tiles& right, const Part& part, int64_t step, int64_t n, float* c,
                          int64_t used) {
  const int64_t c_stride = part.columns * kTile;
  int64_t done = 0;
  // AMX alone loads tiles; the other units broadcast words, which a row of floats or of pairs has as it lies.
  if constexpr (!kPairs || PE_LEVEL == 3) {
    const int64_t cols = rows.m.cols, words = kPairs ? cols / 2 : cols;
    const bool aligned = reinterpret_cast<uintptr_t>(rows.m.data) % sizeof(uint32_t) == 0;
    if (rows.m.type == (kPairs ? Type::bf16 : Type::f32) && as_it_lies(rows) && cols % kStep<kPairs> == 0 && aligned) {
      done = used == 16 ? part.rows : part.rows - 1;
      const uint32_t* from = static_cast<const uint32_t*>(rows.m.data) + 16 * (part.row * words + step);
      multiply<kPairs, true, true>(from, words, done, right.data, right.stride, part.columns,
                                   least(n, words / 16 - step), c, c_stride, 16, step == 0);
      if (done == part.rows) return;
    }
  }
  const int64_t rest = part.rows - done;
  uint32_t* block = scratch<uint32_t>(Slot::panel, rest * n * kTile);
  left_panel<kPairs>(rows, false, 16 * (part.row + done), rest, step, n, block);
  multiply<kPairs, true>(block, n * kTile, rest, right.data, right.stride, part.columns, n, c + done * c_stride,
                         c_stride, used, step == 0);
}

// The same for rows that are tiles already.
template <bool kPairs>
inline void multiply_part(const Tiles& left, const Tiles& right, const Part& part, int64_t step, int64_t n, float* c,
                          int64_t used) {
  multiply<kPairs, true>(left.at(part.row, step), left.stride, part.rows, right.data, right.stride, part.columns, n, c,
                         part.columns * kTile, used, step == 0);
}

// The part's tiles of left x weight, over `steps`; tile (t, j) at t * part.columns + j. Of the last tile of rows, `used`
// rows count.
template <bool kPairs, class Left, class Right>
inline float* product(const Left& left, const Right& weight, int64_t steps, const Part& part, int64_t used) {
  float* c = scratch<float>(Slot::accumulators, part.rows * part.columns * kTile);
  for (int64_t step = 0; step < steps; step += kBlock) {
    const int64_t n = least(kBlock, steps - step);
    multiply_part<kPairs>(left, weight.block(part, step, n), part, step, n, c, used);
  }
  return c;
}

// Runs `first` on all parts of a cut and then `second` on those of another, of the same groups of rows. Where threads get
// their share of groups, each takes its own through both, while they are in the cache.
template <class First, class Second>
inline void in_turn(const Cut& a, const First& first, const Cut& b, const Second& second, bool worth, int64_t threads) {
  const auto run = [](const Cut& cut, const auto& body, int64_t begin, int64_t end) {
    const TileUnit unit;
    for (int64_t task = begin; task < end; ++task) body(part_of(cut, task), task);
  };
  if (a.groups >= 4 * threads || a.groups % threads == 0) {
    in_parallel(a.groups, worth, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        run(a, first, g * a.panels, (g + 1) * a.panels);
        run(b, second, g * b.panels, (g + 1) * b.panels);
      }
    });
    return;
  }
  in_parallel(a.tasks(), worth, [&](int64_t begin, int64_t end) { run(a, first, begin, end); });
  in_parallel(b.tasks(), worth, [&](int64_t begin, int64_t end) { run(b, second, begin, end); });
}

// 16 x 16 floats into a row of tiles as a left operand, at columns 16 j.
template <bool kPairs>
inline void put_tile(const float* from, int64_t j, uint32_t* tiles) {
  if constexpr (!kPairs) {
    memcpy(tiles + j * kTile, from, kTile * sizeof(float));
  } else {
    uint16_t* to = reinterpret_cast<uint16_t*>(tiles + j / 2 * kTile) + j % 2 * 16;
    for (int r = 0; r < 16; ++r)
      for (int i = 0; i < 16; i += kWidth) store<Bf16>(to + 32 * r + i, load<F32>(from + 16 * r + i));
  }
}

// Left operands of `rows` x `columns` tiles of floats; what put_tile leaves of a last pair is zero.
template <bool kPairs>
inline Tiles left_tiles(int64_t rows, int64_t columns, uint32_t* data) {
  const int64_t steps = kPairs ? (columns + 1) / 2 : columns;
  const Tiles out{data, steps * kTile};
  if (kPairs && columns % 2 == 1)
    for (int64_t t = 0; t < rows; ++t) memset(out.at(t, steps - 1), 0, kTile * sizeof(uint32_t));
  return out;
}

// `n` values of the adapter's as floats, and zeros up to a whole number of 64; with no data all are `otherwise`.
inline const float* padded_floats(const void* data, Type type, int64_t n, float otherwise, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = data == nullptr ? otherwise : load_one(data, type, i);
  for (int64_t i = n; i < (n + 63) / 64 * 64; ++i) out[i] = 0.0f;
  return out;
}

// x as the first product reads it: through the norm, if there is one.
inline Source input_of(const BottleneckAdapter& a, const void* x, Type type, int64_t rows, const float* stats) {
  Source z = dense(x, type, rows, a.features);
  if (a.norm == nullptr) return z;
  const int64_t padded = (a.features + 63) / 64 * 64;
  float* gain = scratch<float>(Slot::dropped, 2 * padded);
  z.stats = stats;
  z.gain = padded_floats(a.norm, a.norm_type, a.features, 1.0f, gain);
  z.shift = padded_floats(a.norm_bias, a.norm_type, a.features, 0.0f, gain + padded);
  return z;
}

// --- forward -------------------------------------------------------------------------------------------------------

template <class T>
inline void row_stats(const typename T::Value* x, int64_t n, float eps, float* stats) {
  Floats sums[4] = {};
  for (int64_t i = 0; i < n; i += kWidth) sums[i / kWidth & 3] += load<T>(x + i, n - i);
  const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(n);
  Floats squares[4] = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Floats v = load<T>(x + i) - mean;
    squares[i / kWidth & 3] += v * v;
  }
  float rest = 0.0f;
  const Floats last = load<T>(x + i, n - i);
  for (int j = 0; j < kWidth && j < n - i; ++j) rest += (last[j] - mean) * (last[j] - mean);
  const float square = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest;
  stats[0] = mean;
  stats[1] = 1.0f / sqrtf(square / static_cast<float>(n) + eps);
}

// The middle and its activation from a tile of the first product.
template <bool kPairs, class W, class A>
inline void middle_tile(const BottleneckForward& f, const float* bias, const float* c, int64_t t, int64_t j,
                        const Tiles& out) {
  const int64_t width = f.adapter.width, n = least(16, width - 16 * j), rows = least(16, f.rows - 16 * t);
  auto* middle = static_cast<typename W::Value*>(f.middle) + 16 * t * width + 16 * j;
  alignas(64) float a[kTile] = {};
  for (int64_t r = 0; r < rows; ++r) {
    typename W::Value m[16];
    for (int i = 0; i < 16; i += kWidth) {
      store<W>(m + i, load<F32>(c + 16 * r + i) + load<F32>(bias + 16 * j + i));
      store<F32>(a + 16 * r + i, A::value(load<W>(m + i)));
    }
    memcpy(middle + r * width, m, static_cast<size_t>(n) * sizeof(m[0]));
  }
  put_tile<kPairs>(a, j, out.at(t, 0));
}

// Asks for the row's next piece of what is read and written. A part is two tiles wide and its rows are far apart, where no
// processor prefetches by itself: 2 % of the time for 4096 features.
template <class Value>
inline void expect_next(const Value* from, Value* to) {
  __builtin_prefetch(from + 32);
  __builtin_prefetch(to + 32, 1);
}

template <class T>
inline void output_tile(const BottleneckForward& f, const float* bias, const float* c, int64_t t, int64_t p) {
  const int64_t features = f.adapter.features, n = least(16, features - 16 * p), rows = least(16, f.rows - 16 * t);
  const int64_t at = 16 * t * features + 16 * p;
  const auto* residual = static_cast<const typename T::Value*>(f.residual) + at;
  auto* y = static_cast<typename T::Value*>(f.y) + at;
  for (int64_t r = 0; r < rows; ++r) {
    const auto up = [&](int i) {
      return (load<F32>(c + 16 * r + i) + load<F32>(bias + 16 * p + i)) * f.adapter.scaling;
    };
    const int64_t row = r * features;
    expect_next(residual + row, y + row);
    if (n == 16)
      for (int i = 0; i < 16; i += kWidth) store<T>(y + row + i, load<T>(residual + row + i) + up(i));
    else
      for (int i = 0; i < n; i += kWidth) store<T>(y + row + i, load<T>(residual + row + i, n - i) + up(i), n - i);
  }
}

template <bool kPairs>
inline void forward_tiles(const BottleneckForward& f, int64_t threads) {
  const BottleneckAdapter& a = f.adapter;
  const bool worth = is_worth(f.rows, a);
  if (!worth) threads = 1;
  const int64_t tiles = tiles_for(f.rows), middles = tiles_for(a.width), outs = tiles_for(a.features);
  const Cut first(tiles, middles, group_tiles(f.rows), 16, threads);
  const Cut second(tiles, outs, group_tiles(f.rows), 2, threads);
  Weight<kPairs, true> down(a.down, a.type, a.width, a.features), up(a.up, a.type, a.features, a.width);
  if (first.groups > 1) {
    down.share(Slot::adapter);
    up.share(Slot::transposed);
    share_weights(down, up, worth, threads);
  }
  float* biases = scratch<float>(Slot::few_rows, a.width + a.features + 128);
  const float* down_bias = padded_floats(a.down_bias, a.type, a.width, 0.0f, biases);
  const float* up_bias = padded_floats(a.up_bias, a.type, a.features, 0.0f, biases + (a.width + 63) / 64 * 64);
  const Source z = input_of(a, f.x, f.type, f.rows, f.stats);
  const Tiles acts =
      left_tiles<kPairs>(tiles, middles, scratch<uint32_t>(Slot::activations, tiles * (middles + 1) * kTile));

  if (a.norm != nullptr)
    with_type(f.type, [&](auto type) {
      using T = decltype(type);
      in_parallel(f.rows, worth, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          row_stats<T>(static_cast<const typename T::Value*>(f.x) + r * a.features, a.features, f.eps, f.stats + 2 * r);
      });
    });

  const auto middle = [&](const Part& part, int64_t) {
    const float* c = product<kPairs>(z, down, down.steps, part, last_used(part, f.rows));
    with_type(a.type, [&](auto weight_type) {
      with_activation(a.activation, [&](auto activation) {
        for (int64_t i = 0; i < part.rows * part.columns; ++i)
          middle_tile<kPairs, decltype(weight_type), decltype(activation)>(
              f, down_bias, c + i * kTile, part.row + i / part.columns, part.column + i % part.columns, acts);
      });
    });
  };
  const auto output = [&](const Part& part, int64_t) {
    const float* c = product<kPairs>(acts, up, acts.stride / kTile, part, last_used(part, f.rows));
    with_type(f.type, [&](auto type) {
      for (int64_t i = 0; i < part.rows * part.columns; ++i)
        output_tile<decltype(type)>(f, up_bias, c + i * kTile, part.row + i / part.columns,
                                    part.column + i % part.columns);
    });
  };
  in_turn(first, middle, second, output, worth, threads);
}

#include "cpu/bottleneck_few.inl"

inline void bottleneck_forward(const BottleneckForward& f, int64_t threads) {
  if (f.rows <= kFewRows) return few_rows_forward(f);
#if PE_LEVEL >= 3
  if (f.type == Type::bf16 && f.adapter.type == Type::bf16) {
    forward_tiles<true>(f, threads);
    return;
  }
#endif
  forward_tiles<false>(f, threads);
}

#include "cpu/bottleneck_backward.inl"
