// y = x keep / (1 - p), one pass; its own backward.
#include "cpu/vector.inl"
#include "cpu/dropout_mask.inl"

// Rows [first, last) of n elements each.
inline void dropout_rows(const void* x, void* y, Type type, int64_t n, const DropoutArgs& arguments, int64_t first,
                         int64_t last) {
  const Dropout dropout = dropout_of(arguments);
  with_type(type, [&](auto t) {
    using T = decltype(t);
    using Value = typename T::Value;
    for (int64_t m = first; m < last; ++m) {
      const Value* from = static_cast<const Value*>(x) + m * n;
      Value* to = static_cast<Value*>(y) + m * n;
      const uint32_t key = dropout.row_key(m);
      for (int64_t i = 0; i < n; i += kWidth) {
        const Floats v = load<T>(from + i, n - i) * dropout.scale;
        store<T>(to + i, dropout.keep_vector(key, i) ? v : Floats{}, n - i);
      }
    }
  });
}
