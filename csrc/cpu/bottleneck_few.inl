// bottleneck forward of a few rows, as in decoding: each weight's row is read as it lies, for one row of x after
// another, where the tiles of bottleneck.inl would lay it out first. Included once per instruction set.
//
// Floor: the bytes of both weights. A row of the result has the same bits among any number of rows up to kFewRows.

constexpr int64_t kFewRows = 2;  // FEW_ROWS in peft_engine/ops/bottleneck.py

// Folds pairs of vectors, kHalf apart, into one each: of every 2 kHalf lanes the first kHalf are the first's.
template <int kHalf>
PE_INLINE void fold_lanes(Floats (&v)[kWidth]) {
  Ints low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i / (2 * kHalf) * 2 * kHalf + i % kHalf + i / kHalf % 2 * kWidth;
    high[i] = low[i] + kHalf;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i)
    v[i] = __builtin_shuffle(v[i], v[i + kHalf], low) + __builtin_shuffle(v[i], v[i + kHalf], high);
  if constexpr (kHalf > 1) fold_lanes<kHalf / 2>(v);
}

// Lane i of the result: the sum of v[i]'s lanes.
PE_INLINE Floats sums_of_lanes(Floats (&v)[kWidth]) {
  fold_lanes<kWidth / 2>(v);
  return v[0];
}

// The product of a row of n floats, zero up to a whole vector, with `count` rows of w, n long: a lane for each.
template <class W>
inline Floats few_products(const float* x, const typename W::Value* w, int64_t n, int64_t count) {
  Floats sum[kWidth];
  for (int i = 0; i < kWidth; ++i) sum[i] = all(0.0f);
  const auto rows = [&](auto of) {  // those behind the last are read as the last
    int64_t k = 0;
    for (; k + kWidth <= n; k += kWidth) {
      const Floats at = load<F32>(x + k);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) sum[i] = multiply_add(load<W>(w + of(i) * n + k), at, sum[i]);
    }
    if (k == n) return;
    const Floats at = load<F32>(x + k);
    for (int i = 0; i < kWidth; ++i) sum[i] = multiply_add(load<W>(w + of(i) * n + k, n - k), at, sum[i]);
  };
  if (count == kWidth) rows([](int i) { return i; });
  else rows([&](int i) { return i < count ? i : count - 1; });
  return sums_of_lanes(sum);
}

template <class T, class W>
inline void few_rows_forward(const BottleneckForward& f) {
  using Value = typename T::Value;
  using Weight = typename W::Value;
  const BottleneckAdapter& a = f.adapter;
  const int64_t features = (a.features + 15) / 16 * 16, width = (a.width + 15) / 16 * 16;
  const bool worth = f.rows * a.features * a.width >= kWorthThreads / 2;
  float* z = scratch<float>(Slot::activations, kFewRows * (features + width));
  float* middle = z + kFewRows * features;
  memset(z, 0, static_cast<size_t>(kFewRows * (features + width)) * sizeof(float));
  const auto* x = static_cast<const Value*>(f.x);
  for (int64_t r = 0; r < f.rows; ++r) {
    const Value* row = x + r * a.features;
    if (a.norm != nullptr) row_stats<T>(row, a.features, f.eps, f.stats + 2 * r);
    with_type(a.norm_type, [&](auto norm_type) {
      using N = decltype(norm_type);
      const auto* gain = static_cast<const typename N::Value*>(a.norm);
      const auto* shift = static_cast<const typename N::Value*>(a.norm_bias);
      for (int64_t k = 0; k < a.features; k += kWidth) {
        const int64_t n = a.features - k;
        Floats v = load<T>(row + k, n);
        if (gain != nullptr) {
          v = (v - f.stats[2 * r]) * f.stats[2 * r + 1] * load<N>(gain + k, n);
          if (shift != nullptr) v += load<N>(shift + k, n);
        }
        store<F32>(z + r * features + k, v, n);
      }
    });
  }
  in_parallel((a.width + kWidth - 1) / kWidth, worth, [&](int64_t begin, int64_t end) {
    const auto* bias = static_cast<const Weight*>(a.down_bias);
    for (int64_t j = begin * kWidth; j < end * kWidth && j < a.width; j += kWidth) {
      const int64_t n = least(kWidth, a.width - j);
      const Weight* down = static_cast<const Weight*>(a.down) + j * a.features;
      for (int64_t r = 0; r < f.rows; ++r) {
        const Floats m = few_products<W>(z + r * features, down, a.features, n);
        Weight* kept = static_cast<Weight*>(f.middle) + r * a.width + j;
        store<W>(kept, bias == nullptr ? m : m + load<W>(bias + j, n), n);
        with_activation(a.activation, [&](auto activation) {
          store<F32>(middle + r * width + j, decltype(activation)::value(load<W>(kept, n)), n);
        });
      }
    }
  });
  in_parallel((a.features + kWidth - 1) / kWidth, worth, [&](int64_t begin, int64_t end) {
    const auto* bias = static_cast<const Weight*>(a.up_bias);
    for (int64_t j = begin * kWidth; j < end * kWidth && j < a.features; j += kWidth) {
      const int64_t n = least(kWidth, a.features - j);
      const Weight* up = static_cast<const Weight*>(a.up) + j * a.width;
      for (int64_t r = 0; r < f.rows; ++r) {
        Floats sum = few_products<W>(middle + r * width, up, a.width, n);
        if (bias != nullptr) sum += load<W>(bias + j, n);
        const int64_t at = r * a.features + j;
        store<T>(static_cast<Value*>(f.y) + at,
                 load<T>(static_cast<const Value*>(f.residual) + at, n) + sum * a.scaling, n);
      }
    }
  });
}

inline void few_rows_forward(const BottleneckForward& f) {
  with_type(f.type, [&](auto type) {
    using T = decltype(type);  // the weights are of x's type, or floats
    if (f.adapter.type == f.type) few_rows_forward<T, T>(f);
    else few_rows_forward<T, F32>(f);
  });
}
