// bottleneck forward and backward as products of tiles (tiles.inl), the rest of the maths at the tiles' edges. Included
// once per instruction set.
//
// Floor: six products of rows x features x width multiplications. Beside them x is laid out as tiles twice (for the
// middle, and for ddown) and dy twice, and the weights once a call, which for a few rows costs more than the products.
// Activation, bias, scaling, residual and their derivatives are done on the tiles that a product leaves in the cache.
//
// An element is summed in the same order wherever its row stands, so a row of y is the same, bit for bit, in any batch,
// and so is every gradient for any number of threads.

#include "cpu/panels.inl"
#include "cpu/activation.inl"

constexpr int64_t kBlock = 8;  // steps of a contraction that are laid out at a time: 16 KiB for two tiles of columns

// Tiles of 16 rows that share a pass over a weight. It depends on the rows alone: the norm's gradients are summed by
// these groups.
inline int64_t group_tiles(int64_t rows) { return rows > 256 ? 4 : 1; }

inline int64_t tiles_for(int64_t n) { return (n + 15) / 16; }

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

// A weight as right operand: its rows are the product's columns.
template <bool kPairs>
inline Tiles along_rows(const Source& w, bool worth, Slot slot) {
  const int64_t steps = steps_for<kPairs>(w.m.cols, false), tiles = tiles_for(w.m.rows);
  const Tiles out{scratch<uint32_t>(slot, tiles * steps * kTile), steps * kTile};
  in_parallel(tiles, worth, [&](int64_t begin, int64_t end) {
    right_panel_of_rows<kPairs>(w, false, 16 * begin, end - begin, 0, steps, out.at(begin, 0));
  });
  return out;
}

// A weight as right operand: its columns are the product's columns.
template <bool kPairs>
inline Tiles down_columns(const Source& w, bool worth, Slot slot) {
  const int64_t steps = steps_for<kPairs>(w.m.rows, false), fours = (tiles_for(w.m.cols) + 3) / 4;
  const Tiles out{scratch<uint32_t>(slot, 4 * fours * steps * kTile), steps * kTile};
  in_parallel(fours, worth, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) right_panel<kPairs>(w, 64 * t, 4, 0, steps, out.at(4 * t, 0));
  });
  return out;
}

// Rows that count in the last tile of a part.
inline int64_t last_used(const Part& part, int64_t rows) {
  const int64_t left = rows - 16 * (part.row + part.rows - 1);
  return left < 16 ? left : 16;
}

// The part's tiles of rows x weight, the contraction along `rows`; tile (t, j) at t * part.columns + j.
template <bool kPairs>
inline float* product_of_rows(const Source& rows, const Tiles& weight, const Part& part) {
  const int64_t steps = weight.stride / kTile, count = part.rows * part.columns;
  float* c = scratch<float>(Slot::accumulators, count * kTile);
  uint32_t* block = scratch<uint32_t>(Slot::panel, part.rows * kBlock * kTile);
  for (int64_t step = 0; step < steps; step += kBlock) {
    const int64_t n = steps - step < kBlock ? steps - step : kBlock;
    left_panel<kPairs>(rows, false, 16 * part.row, part.rows, step, n, block);
    multiply<kPairs, true>(block, n * kTile, part.rows, weight.at(part.column, step), weight.stride, part.columns, n, c,
                           part.columns * kTile, last_used(part, rows.m.rows), step == 0);
  }
  return c;
}

// The same for rows that are tiles already, over `steps`.
template <bool kPairs>
inline float* product_of_tiles(const Tiles& left, const Tiles& weight, int64_t steps, const Part& part, int64_t used) {
  const int64_t count = part.rows * part.columns;
  float* c = scratch<float>(Slot::accumulators, count * kTile);
  multiply<kPairs, true>(left.at(part.row, 0), left.stride, part.rows, weight.at(part.column, 0), weight.stride,
                         part.columns, steps, c, part.columns * kTile, used, true);
  return c;
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

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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
    if (n == 16)
      for (int i = 0; i < 16; i += kWidth) store<T>(y + row + i, load<T>(residual + row + i) + up(i));
    else
      for (int i = 0; i < n; i += kWidth) store<T>(y + row + i, load<T>(residual + row + i, n - i) + up(i), n - i);
  }
}

template <bool kPairs>
inline void forward_tiles(const BottleneckForward& f, int64_t threads) {
  const BottleneckAdapter& a = f.adapter;
  const bool worth = f.rows * a.features * a.width >= kWorthThreads;
  if (!worth) threads = 1;
  const int64_t tiles = tiles_for(f.rows), middles = tiles_for(a.width), outs = tiles_for(a.features);
  const Tiles down = along_rows<kPairs>(dense(a.down, a.type, a.width, a.features), worth, Slot::adapter);
  const Tiles up = along_rows<kPairs>(dense(a.up, a.type, a.features, a.width), worth, Slot::transposed);
  float* biases = scratch<float>(Slot::few_rows, a.width + a.features + 128);
  const float* down_bias = padded_floats(a.down_bias, a.type, a.width, 0.0f, biases);
  const float* up_bias = padded_floats(a.up_bias, a.type, a.features, 0.0f, biases + (a.width + 63) / 64 * 64);
  const Source z = input_of(a, f.x, f.type, f.rows, f.stats);
  if (a.norm != nullptr)
    with_type(f.type, [&](auto type) {
      using T = decltype(type);
      in_parallel(f.rows, worth, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          row_stats<T>(static_cast<const typename T::Value*>(f.x) + r * a.features, a.features, f.eps, f.stats + 2 * r);
      });
    });
  const Tiles acts =
      left_tiles<kPairs>(tiles, middles, scratch<uint32_t>(Slot::activations, tiles * (middles + 1) * kTile));

  const Cut first(tiles, middles, group_tiles(f.rows), 16, threads);
  with_type(a.type, [&](auto weight_type) {
    with_activation(a.activation, [&](auto activation) {
      in_parallel(first.tasks(), worth, [&](int64_t begin, int64_t end) {
        const TileUnit unit;
        for (int64_t task = begin; task < end; ++task) {
          const Part part = part_of(first, task);
          const float* c = product_of_rows<kPairs>(z, down, part);
          for (int64_t i = 0; i < part.rows * part.columns; ++i)
            middle_tile<kPairs, decltype(weight_type), decltype(activation)>(
                f, down_bias, c + i * kTile, part.row + i / part.columns, part.column + i % part.columns, acts);
        }
      });
    });
  });
  const Cut second(tiles, outs, group_tiles(f.rows), 8, threads);
  with_type(f.type, [&](auto type) {
    in_parallel(second.tasks(), worth, [&](int64_t begin, int64_t end) {
      const TileUnit unit;
      for (int64_t task = begin; task < end; ++task) {
        const Part part = part_of(second, task);
        const float* c = product_of_tiles<kPairs>(acts, up, acts.stride / kTile, part, last_used(part, f.rows));
        for (int64_t i = 0; i < part.rows * part.columns; ++i)
          output_tile<decltype(type)>(f, up_bias, c + i * kTile, part.row + i / part.columns,
                                      part.column + i % part.columns);
      }
    });
  });
}

inline void bottleneck_forward(const BottleneckForward& f, int64_t threads) {
#if PE_LEVEL >= 3
  if (f.type == Type::bf16 && f.adapter.type == Type::bf16) {
    forward_tiles<true>(f, threads);
    return;
  }
#endif
  forward_tiles<false>(f, threads);
}

#include "cpu/bottleneck_backward.inl"
