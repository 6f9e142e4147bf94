// y = factor y0 + bias, and dy0 = factor dy with dm = sum over rows of (dy y0) / n, in float, one pass each.
#include "cpu/vector.inl"

inline void dora_linear_rows(const void* y, const float* factor, const float* bias, void* out, Type type, int64_t n,
                             int64_t first, int64_t last) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    using Value = typename T::Value;
    for (int64_t m = first; m < last; ++m) {
      const Value* from = static_cast<const Value*>(y) + m * n;
      Value* to = static_cast<Value*>(out) + m * n;
      for (int64_t i = 0; i < n; i += kWidth) {
        Floats v = load<T>(from + i, n - i) * load<F32>(factor + i, n - i);
        if (bias != nullptr) v += load<F32>(bias + i, n - i);
        store<T>(to + i, v, n - i);
      }
    }
  });
}

// dy0 of the rows from `first` on, and in sums, unless it is null, what they add to dm. Rows go by in fours, so that a
// sum is loaded and stored once for four.
inline void dora_linear_backward_rows(const void* dy, const void* y, const float* factor, void* dy0, float* sums,
                                      Type type, int64_t n, int64_t first, int64_t last) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    using Value = typename T::Value;
    constexpr int64_t kRows = 4;
    for (int64_t i = 0; sums != nullptr && i < n; ++i) sums[i] = 0.0f;
    for (int64_t start = first; start < last; start += kRows) {
      const int64_t end = start + kRows < last ? start + kRows : last;
      for (int64_t i = 0; i < n; i += kWidth) {
        const Floats f = load<F32>(factor + i, n - i);
        Floats part = {};
        for (int64_t m = start; m < end; ++m) {
          const int64_t at = m * n + i;
          const Floats grad = load<T>(static_cast<const Value*>(dy) + at, n - i);
          store<T>(static_cast<Value*>(dy0) + at, grad * f, n - i);
          if (sums != nullptr) part += grad * load<T>(static_cast<const Value*>(y) + at, n - i);
        }
        if (sums != nullptr) store<F32>(sums + i, part + load<F32>(sums + i, n - i), n - i);
      }
    }
  });
}
