// y = silu(gate) * up = gate * sigmoid(gate) * up, in float, one pass.
#include "cpu/vector.inl"

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Rows of n elements; gate and up may be halves of a wider row, so each has its stride.
inline void swiglu_rows(const void* gate, const void* up, void* out, Type type, int64_t n, int64_t gate_stride,
                        int64_t up_stride, int64_t first, int64_t last) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    using Value = typename T::Value;
    for (int64_t m = first; m < last; ++m) {
      const Value *g = static_cast<const Value*>(gate) + m * gate_stride,
                  *u = static_cast<const Value*>(up) + m * up_stride;
      Value* y = static_cast<Value*>(out) + m * n;
      for (int64_t i = 0; i < n; i += kWidth) {
        const Floats v = load<T>(g + i, n - i);
        store<T>(y + i, v * sigmoid(v) * load<T>(u + i, n - i), n - i);
      }
    }
  });
}

// dgate = dy * up * s (1 + gate (1 - s)), dup = dy * gate * s, with s = sigmoid(gate).
inline void swiglu_backward_rows(const void* dy, const void* gate, const void* up, void* dgate, void* dup, Type type,
                                 int64_t n, int64_t gate_stride, int64_t up_stride, int64_t first, int64_t last) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    using Value = typename T::Value;
    for (int64_t m = first; m < last; ++m) {
      const Value *g = static_cast<const Value*>(gate) + m * gate_stride,
                  *u = static_cast<const Value*>(up) + m * up_stride;
      const Value* d = static_cast<const Value*>(dy) + m * n;
      Value *dg = static_cast<Value*>(dgate) + m * n, *du = static_cast<Value*>(dup) + m * n;
      for (int64_t i = 0; i < n; i += kWidth) {
        const Floats v = load<T>(g + i, n - i), grad = load<T>(d + i, n - i), s = sigmoid(v);
        store<T>(du + i, grad * v * s, n - i);
        store<T>(dg + i, grad * load<T>(u + i, n - i) * s * (1.0f + v * (1.0f - s)), n - i);
      }
    }
  });
}
