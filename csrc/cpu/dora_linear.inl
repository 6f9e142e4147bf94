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

// A block of columns is one thread's over all rows, so that its sums are in the order of rows with any number of
// threads; in double across kRows rows, so that the sum over many keeps its digits (torch sums in pairs).
constexpr int kDoraColumns = 16 * kWidth;
inline int dora_linear_columns() { return kDoraColumns; }

inline void dora_linear_backward_columns(const void* dy, const void* y, const float* factor, const float* norm,
                                         void* dy0, float* dm, Type type, int64_t rows, int64_t n, int64_t first,
                                         int64_t last) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    using Value = typename T::Value;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kDoraColumns, width = n - begin < kDoraColumns ? n - begin : kDoraColumns;
      constexpr int64_t kRows = 8;
      double total[kDoraColumns] = {};
      for (int64_t start = 0; start < rows; start += kRows) {
        const int64_t end = start + kRows < rows ? start + kRows : rows;
        for (int64_t i = 0; i < width; i += kWidth) {
          const int64_t left = width - i;
          const Floats f = load<F32>(factor + begin + i, left);
          Floats part = {};
          for (int64_t m = start; m < end; ++m) {
            const int64_t at = m * n + begin + i;
            const Floats grad = load<T>(static_cast<const Value*>(dy) + at, left);
            store<T>(static_cast<Value*>(dy0) + at, grad * f, left);
            if (dm != nullptr) part += grad * load<T>(static_cast<const Value*>(y) + at, left);
          }
          for (int j = 0; j < kWidth; ++j) total[i + j] += part[j];
        }
      }
      for (int64_t i = 0; dm != nullptr && i < width; ++i)
        dm[begin + i] = static_cast<float>(total[i] / (norm[begin + i] > FLT_MIN ? norm[begin + i] : FLT_MIN));
    }
  });
}
