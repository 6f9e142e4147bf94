// y = x * rstd * (offset + w), rstd = 1 / sqrt(mean(x^2) + eps), a row at a time, in float. The row is read twice, the
// second time from the first-level cache.
#include "cpu/vector.inl"

template <class T, class W>
inline void rms_norm_row(const typename T::Value* x, const typename W::Value* w, float offset, float eps, int64_t n,
                         typename T::Value* y, float* rstd) {
  Floats squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int u = 0; u < 4; ++u) {
      const Floats v = load<T>(x + i + u * kWidth);
      squares[u] += v * v;
    }
  for (; i < n; i += kWidth) {
    const Floats v = load<T>(x + i, n - i);
    squares[0] += v * v;
  }
  const float scale = 1.0f / sqrtf(sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / n + eps);
  *rstd = scale;
  for (i = 0; i < n; i += kWidth)
    store<T>(y + i, load<T>(x + i, n - i) * scale * (load<W>(w + i, n - i) + offset), n - i);
}

inline void rms_norm_rows(const void* x, const void* w, void* y, float* rstd, Type type, Type weight_type, float offset,
                          float eps, int64_t n, int64_t first, int64_t last) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    with_type(weight_type, [&](auto u) {
      using W = decltype(u);
      for (int64_t m = first; m < last; ++m)
        rms_norm_row<T, W>(static_cast<const typename T::Value*>(x) + m * n, static_cast<const typename W::Value*>(w),
                           offset, eps, n, static_cast<typename T::Value*>(y) + m * n, rstd + m);
    });
  });
}

// dx = rstd * (g - x * rstd^2 * mean(g x)), with g = dy * (offset + w).
inline void rms_norm_backward_rows(const void* dy, const void* x, const void* w, const float* rstd, void* dx, Type type,
                                   Type weight_type, float offset, int64_t n, int64_t first, int64_t last) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    with_type(weight_type, [&](auto u) {
      using W = decltype(u);
      const auto* weight = static_cast<const typename W::Value*>(w);
      for (int64_t m = first; m < last; ++m) {
        const auto* row = static_cast<const typename T::Value*>(x) + m * n;
        const auto* grad = static_cast<const typename T::Value*>(dy) + m * n;
        auto* out = static_cast<typename T::Value*>(dx) + m * n;
        Floats dot[2] = {};
        for (int64_t i = 0; i < n; i += kWidth)
          dot[i / kWidth & 1] +=
              load<T>(grad + i, n - i) * (load<W>(weight + i, n - i) + offset) * load<T>(row + i, n - i);
        const float scale = rstd[m], mean = sum(dot[0] + dot[1]) / n * scale * scale;
        for (int64_t i = 0; i < n; i += kWidth) {
          const Floats g = load<T>(grad + i, n - i) * (load<W>(weight + i, n - i) + offset);
          store<T>(out + i, (g - load<T>(row + i, n - i) * mean) * scale, n - i);
        }
      }
    });
  });
}

// dw[i] = sum over rows of dy * x * rstd, for the kWidth columns from i; in double across blocks of kRows rows, so that
// the sum over many rows keeps its digits (torch sums in pairs). Each column is summed by one thread in the order of rows.
inline void rms_norm_weight_columns(const void* dy, const void* x, const float* rstd, void* dw, Type type,
                                    Type weight_type, int64_t rows, int64_t n, int64_t first, int64_t last) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    with_type(weight_type, [&](auto u) {
      using W = decltype(u);
      for (int64_t block = first; block < last; ++block) {
        const int64_t i = block * kWidth;
        constexpr int64_t kRows = 8;
        double total[kWidth] = {};
        for (int64_t start = 0; start < rows; start += kRows) {
          Floats part = {};
          for (int64_t m = start; m < rows && m < start + kRows; ++m)
            part += load<T>(static_cast<const typename T::Value*>(dy) + m * n + i, n - i) *
                    load<T>(static_cast<const typename T::Value*>(x) + m * n + i, n - i) * rstd[m];
          for (int j = 0; j < kWidth; ++j) total[j] += part[j];
        }
        Floats out;
        for (int j = 0; j < kWidth; ++j) out[j] = static_cast<float>(total[j]);
        store<W>(static_cast<typename W::Value*>(dw) + i, out, n - i);
      }
    });
  });
}

inline int rms_norm_columns() { return kWidth; }
