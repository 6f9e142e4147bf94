// The backward of bottleneck.inl, which includes it.
//
//   1. by groups of rows:     da = s dy Wu, dm = da act'(m), kept as tiles, and turned, with a = act(m), for 3.
//   2. by groups of rows:     dz = dm Wd, then dx, the norm's backward with it
//   3. by panels of columns:  dWu^T = s a^T dy, dbu = s sum(dy), dWd = dm^T z, over all rows in order

// What the first phase leaves: dm as left operand of dz, and dm^T and a^T as left operands of the weights' gradients.
struct Middles {
  Tiles dm, dm_turned, a_turned;
};

template <bool kPairs>
inline void put_turned(const float* tile, int64_t t, int64_t j, const Tiles& out) {
  alignas(64) uint32_t in[kTile], turned[kTile];
  memcpy(in, tile, sizeof in);
  transpose16(in, turned);
  put_tile<kPairs>(reinterpret_cast<const float*>(turned), t, out.at(j, 0));
}

// c: the tile of dy Wu, or null where no gradient needs it.
template <bool kPairs, class W, class A>
inline void middle_gradient_tile(const BottleneckBackward& f, const float* c, int64_t t, int64_t j,
                                 const Middles& out) {
  const int64_t width = f.adapter.width, n = least(16, width - 16 * j), rows = least(16, f.rows - 16 * t);
  const auto* middle = static_cast<const typename W::Value*>(f.middle) + 16 * t * width + 16 * j;
  alignas(64) float a[kTile] = {}, dm[kTile] = {};
  for (int64_t r = 0; r < rows; ++r) {
    typename W::Value m[16] = {};
    memcpy(m, middle + r * width, static_cast<size_t>(n) * sizeof(m[0]));
    for (int i = 0; i < 16; i += kWidth) {
      const Floats v = load<W>(m + i);
      if (f.dup != nullptr) store<F32>(a + 16 * r + i, A::value(v));
      if (c != nullptr) store<F32>(dm + 16 * r + i, load<F32>(c + 16 * r + i) * f.adapter.scaling * A::slope(v));
    }
  }
  if (f.dup != nullptr) put_turned<kPairs>(a, t, j, out.a_turned);
  if (c == nullptr) return;
  put_tile<kPairs>(dm, j, out.dm.at(t, 0));
  put_turned<kPairs>(dm, t, j, out.dm_turned);
}

// --- dx ------------------------------------------------------------------------------------------------------------

template <class T>
inline void input_gradient_tile(const BottleneckBackward& f, const float* c, int64_t t, int64_t p) {
  const int64_t features = f.adapter.features, n = least(16, features - 16 * p), rows = least(16, f.rows - 16 * t);
  const int64_t at = 16 * t * features + 16 * p;
  const auto* dy = static_cast<const typename T::Value*>(f.dy) + at;
  auto* dx = static_cast<typename T::Value*>(f.dx) + at;
  for (int64_t r = 0; r < rows; ++r) {
    expect_next(dy + r * features, dx + r * features);
    for (int i = 0; i < n; i += kWidth) {
      Floats v = load<F32>(c + 16 * r + i);
      if (f.residual_is_x) v += load<T>(dy + r * features + i, n - i);
      store<T>(dx + r * features + i, v, n - i);
    }
  }
}

// One row of the norm's backward: dz (floats, zeros beyond the row) to dx, and dz's part of the norm's gradients.
template <class T>
inline void norm_gradient_row(const BottleneckBackward& f, const Source& z, const float* dz, int64_t row, float* dnorm,
                              float* dnorm_bias) {
  const int64_t n = f.adapter.features;
  const auto* x = static_cast<const typename T::Value*>(f.x) + row * n;
  const float mean = f.stats[2 * row], rstd = f.stats[2 * row + 1];
  Floats sums[2] = {}, dots[2] = {};
  for (int64_t i = 0; i < n; i += kWidth) {
    const Floats v = load<F32>(dz + i), normed = (load<T>(x + i, n - i) - mean) * rstd, g = v * load<F32>(z.gain + i);
    sums[i / kWidth & 1] += g;
    dots[i / kWidth & 1] += g * normed;
    store<F32>(dnorm + i, load<F32>(dnorm + i) + v * normed);
    store<F32>(dnorm_bias + i, load<F32>(dnorm_bias + i) + v);
  }
  if (f.dx == nullptr) return;
  const float mean_g = sum(sums[0] + sums[1]) / static_cast<float>(n);
  const float mean_dot = sum(dots[0] + dots[1]) / static_cast<float>(n);
  const auto* dy = static_cast<const typename T::Value*>(f.dy) + row * n;
  auto* dx = static_cast<typename T::Value*>(f.dx) + row * n;
  for (int64_t i = 0; i < n; i += kWidth) {
    const Floats normed = (load<T>(x + i, n - i) - mean) * rstd, g = load<F32>(dz + i) * load<F32>(z.gain + i);
    Floats v = (g - mean_g - normed * mean_dot) * rstd;
    if (f.residual_is_x) v += load<T>(dy + i, n - i);
    store<T>(dx + i, v, n - i);
  }
}

// A group of rows through the norm's backward, a tile of rows at a time; dnorm and dnorm_bias are the group's own.
template <bool kPairs, class T>
inline void norm_gradient_group(const BottleneckBackward& f, const Source& z, const Tiles& dm,
                                const Weight<kPairs, false>& down, const Part& group, float* dnorm, float* dnorm_bias) {
  const int64_t columns = tiles_for(f.adapter.features), padded = (f.adapter.features + 63) / 64 * 64;
  float* dz = scratch<float>(Slot::panel, 16 * padded);
  for (int64_t t = group.row; t < group.row + group.rows; ++t) {
    const int64_t rows = least(16, f.rows - 16 * t);
    for (int64_t p = 0; p < columns; p += 8) {
      const Part part{t, 1, p, least(8, columns - p)};
      const float* c = product<kPairs>(dm, down, dm.stride / kTile, part, rows);
      for (int64_t j = 0; j < part.columns; ++j)
        for (int64_t r = 0; r < rows; ++r)
          memcpy(dz + r * padded + 16 * (p + j), c + j * kTile + 16 * r, 16 * sizeof(float));
    }
    for (int64_t r = 0; r < rows; ++r) norm_gradient_row<T>(f, z, dz + r * padded, 16 * t + r, dnorm, dnorm_bias);
  }
}

// --- the weights ---------------------------------------------------------------------------------------------------

// Adds the sums down the columns of a block of a right operand, laid out by right_panel.
template <bool kPairs>
inline void add_column_sums(const uint32_t* block, int64_t tiles, int64_t steps, float* sums) {
  for (int64_t t = 0; t < tiles; ++t) {
    for (int i = 0; i < 16; i += kWidth) {
      Floats part = {};
      for (int64_t k = 0; k < 16 * steps; ++k) {
        const uint32_t* from = block + t * steps * kTile + 16 * k + i;
        if constexpr (kPairs) {
          Words pair;
          memcpy(&pair, from, sizeof pair);
          part += (Floats)(pair << 16) + (Floats)(pair & 0xFFFF0000);
        } else {
          part += load<F32>(reinterpret_cast<const float*>(from));
        }
      }
      store<F32>(sums + 16 * t + i, load<F32>(sums + 16 * t + i) + part);
    }
  }
}

constexpr int64_t kPanel = 4;  // tiles of columns in a panel of a weight's gradient

// Tiles (j, p) of turned x columns, the contraction over all rows, for a panel of columns; tile (j, p) is at
// j * kPanel + p. The sums down the columns besides, where asked for.
template <bool kPairs>
inline float* product_over_rows(const Tiles& turned, int64_t middles, const Source& columns, int64_t panel,
                                float* sums) {
  const int64_t steps = (columns.m.rows + kStep<kPairs> - 1) / kStep<kPairs>;
  float* c = scratch<float>(Slot::accumulators, middles * kPanel * kTile);
  uint32_t* block = scratch<uint32_t>(Slot::panel, kPanel * kBlock * kTile);
  if (steps == 0) memset(c, 0, static_cast<size_t>(middles * kPanel * kTile) * sizeof(float));
  for (int64_t step = 0; step < steps; step += kBlock) {
    const int64_t n = least(kBlock, steps - step);
    right_panel<kPairs>(columns, 16 * kPanel * panel, kPanel, step, n, block);
    if (sums != nullptr) add_column_sums<kPairs>(block, kPanel, n, sums);
    if (turned.data == nullptr) continue;
    multiply<kPairs, true>(turned.at(0, step), turned.stride, middles, block, n * kTile, kPanel, n, c, kPanel * kTile,
                           16, step == 0);
  }
  return c;
}

// A panel of dup (features, width), and of dup_bias.
template <bool kPairs, class W>
inline void up_gradient(const BottleneckBackward& f, Tiles a_turned, int64_t panel) {
  const int64_t width = f.adapter.width, features = f.adapter.features, middles = tiles_for(width);
  if (f.dup == nullptr) a_turned.data = nullptr;
  float sums[16 * kPanel] = {};
  const float* c = product_over_rows<kPairs>(a_turned, middles, dense(f.dy, f.type, f.rows, features), panel,
                                             f.dup_bias == nullptr ? nullptr : sums);
  for (int64_t p = 0; p < kPanel; ++p) {
    const int64_t column = 16 * (kPanel * panel + p), count = least(16, features - column);
    if (count <= 0) break;
    if (f.dup_bias != nullptr)
      for (int i = 0; i < count; i += kWidth)
        store<W>(static_cast<typename W::Value*>(f.dup_bias) + column + i,
                 load<F32>(sums + 16 * p + i) * f.adapter.scaling, count - i);
    for (int64_t j = 0; f.dup != nullptr && j < middles; ++j) {
      alignas(64) uint32_t in[kTile], turned[kTile];
      memcpy(in, c + (j * kPanel + p) * kTile, sizeof in);
      transpose16(in, turned);
      const int64_t n = least(16, width - 16 * j);
      for (int64_t r = 0; r < count; ++r)
        for (int i = 0; i < n; i += kWidth)
          store<W>(static_cast<typename W::Value*>(f.dup) + (column + r) * width + 16 * j + i,
                   load<F32>(reinterpret_cast<const float*>(turned) + 16 * r + i) * f.adapter.scaling, n - i);
    }
  }
}

// A panel of ddown (width, features).
template <bool kPairs, class W>
inline void down_gradient(const BottleneckBackward& f, const Tiles& dm_turned, const Source& z, int64_t panel) {
  const int64_t width = f.adapter.width, features = f.adapter.features, middles = tiles_for(width);
  const float* c = product_over_rows<kPairs>(dm_turned, middles, z, panel, nullptr);
  for (int64_t p = 0; p < kPanel; ++p) {
    const int64_t column = 16 * (kPanel * panel + p), n = least(16, features - column);
    for (int64_t j = 0; j < middles; ++j)
      for (int64_t r = 0; r < least(16, width - 16 * j); ++r)
        for (int i = 0; i < n; i += kWidth)
          store<W>(static_cast<typename W::Value*>(f.ddown) + (16 * j + r) * features + column + i,
                   load<F32>(c + (j * kPanel + p) * kTile + 16 * r + i), n - i);
  }
}

// ddown_bias: the sums of dm, which lie in the rows of its turned tiles.
template <bool kPairs, class W>
inline void down_bias_gradient(const BottleneckBackward& f, const Tiles& dm_turned) {
  const int64_t steps = (f.rows + kStep<kPairs> - 1) / kStep<kPairs>;
  for (int64_t r = 0; r < f.adapter.width; ++r) {
    Floats total = {};
    for (int64_t step = 0; step < steps; step += kBlock) {
      Floats part = {};
      for (int64_t s = step; s < least(steps, step + kBlock); ++s) {
        const uint32_t* row = dm_turned.at(r / 16, s) + 16 * (r % 16);
        for (int i = 0; i < 16; i += kWidth) {
          if constexpr (kPairs) {
            const auto* pairs = reinterpret_cast<const uint16_t*>(row);
            part += load<Bf16>(pairs + i) + load<Bf16>(pairs + 16 + i);
          } else {
            part += load<F32>(reinterpret_cast<const float*>(row) + i);
          }
        }
      }
      total += part;
    }
    typename W::Value out[kWidth];
    store<W>(out, all(sum(total)));
    static_cast<typename W::Value*>(f.ddown_bias)[r] = out[0];
  }
}

// The norm's gradients from those of the groups, in their order.
inline void norm_gradient(const BottleneckBackward& f, const float* parts, int64_t groups, int64_t padded) {
  with_type(f.adapter.norm_type, [&](auto type) {
    using W = decltype(type);
    const int64_t n = f.adapter.features;
    void* const outs[2] = {f.dnorm, f.dnorm_bias};
    for (int which = 0; which < 2; ++which) {
      if (outs[which] == nullptr) continue;
      for (int64_t i = 0; i < n; i += kWidth) {
        Floats total = {};
        for (int64_t g = 0; g < groups; ++g) total += load<F32>(parts + (2 * g + which) * padded + i);
        store<W>(static_cast<typename W::Value*>(outs[which]) + i, total, n - i);
      }
    }
  });
}

template <bool kPairs>
inline void backward_tiles(const BottleneckBackward& f, int64_t threads) {
  const BottleneckAdapter& a = f.adapter;
  const bool worth = is_worth(f.rows, a);
  if (!worth) threads = 1;
  const bool norm = f.dnorm != nullptr || f.dnorm_bias != nullptr || (a.norm != nullptr && f.dx != nullptr);
  const bool dz = norm || f.dx != nullptr, dm = dz || f.ddown != nullptr || f.ddown_bias != nullptr;
  const int64_t tiles = tiles_for(f.rows), middles = tiles_for(a.width), columns = tiles_for(a.features);
  const int64_t group = group_tiles(f.rows), most = (tiles + 1) * (middles + 1) * kTile;
  uint32_t* data = scratch<uint32_t>(Slot::activations, 3 * most);
  const Middles m{left_tiles<kPairs>(tiles, middles, data), left_tiles<kPairs>(middles, tiles, data + most),
                  left_tiles<kPairs>(middles, tiles, data + 2 * most)};
  const Cut first(tiles, middles, group, 16, threads);
  const Cut second(tiles, columns, group, norm ? columns + 1 : 2, norm ? 1 : threads);
  Weight<kPairs, false> up(a.up, a.type, a.features, a.width), down(a.down, a.type, a.width, a.features);
  if (first.groups > 1) {
    if (dm) up.share(Slot::transposed);
    if (dz) down.share(Slot::adapter);
    share_weights(up, down, worth, threads);
  }
  const Source dy = dense(f.dy, f.type, f.rows, a.features), z = input_of(a, f.x, f.type, f.rows, f.stats);
  const int64_t padded = (a.features + 63) / 64 * 64;
  float* parts = norm ? scratch<float>(Slot::few_rows, 2 * second.groups * padded) : nullptr;
  if (norm) memset(parts, 0, static_cast<size_t>(2 * second.groups * padded) * sizeof(float));

  const auto middle = [&](const Part& part, int64_t) {
    if (!dm && f.dup == nullptr) return;
    const float* c = dm ? product<kPairs>(dy, up, up.steps, part, last_used(part, f.rows)) : nullptr;
    with_type(a.type, [&](auto weight_type) {
      with_activation(a.activation, [&](auto activation) {
        for (int64_t i = 0; i < part.rows * part.columns; ++i)
          middle_gradient_tile<kPairs, decltype(weight_type), decltype(activation)>(
              f, c == nullptr ? c : c + i * kTile, part.row + i / part.columns, part.column + i % part.columns, m);
      });
    });
  };
  const auto input = [&](const Part& part, int64_t task) {
    if (!dz) return;
    with_type(f.type, [&](auto type) {
      using T = decltype(type);
      if (norm) {
        float* mine = parts + 2 * task * padded;
        norm_gradient_group<kPairs, T>(f, z, m.dm, down, part, mine, mine + padded);
        return;
      }
      const float* c = product<kPairs>(m.dm, down, m.dm.stride / kTile, part, last_used(part, f.rows));
      for (int64_t i = 0; i < part.rows * part.columns; ++i)
        input_gradient_tile<T>(f, c + i * kTile, part.row + i / part.columns, part.column + i % part.columns);
    });
  };
  in_turn(first, middle, second, input, worth, threads);

  const int64_t panels = (columns + kPanel - 1) / kPanel, biases = f.ddown_bias != nullptr ? 1 : 0;
  const int64_t ups = f.dup != nullptr || f.dup_bias != nullptr ? panels : 0, downs = f.ddown != nullptr ? panels : 0;
  with_type(a.type, [&](auto weight_type) {
    using W = decltype(weight_type);
    in_parallel(ups + downs + biases, worth, [&](int64_t begin, int64_t end) {
      const TileUnit unit;
      for (int64_t task = begin; task < end; ++task) {
        if (task < ups) up_gradient<kPairs, W>(f, m.a_turned, task);
        else if (task < ups + downs) down_gradient<kPairs, W>(f, m.dm_turned, z, task - ups);
        else down_bias_gradient<kPairs, W>(f, m.dm_turned);
      }
    });
  });
  if (f.dnorm != nullptr || f.dnorm_bias != nullptr) norm_gradient(f, parts, second.groups, padded);
}

inline void bottleneck_backward(const BottleneckBackward& f, int64_t threads) {
#if PE_LEVEL >= 3
  if (f.type == Type::bf16 && f.adapter.type == Type::bf16) {
    backward_tiles<true>(f, threads);
    return;
  }
#endif
  backward_tiles<false>(f, threads);
}
