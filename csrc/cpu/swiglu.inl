// y = act(gate) * up, in float, one pass, for an activation act(v) = v s(v).
#include "cpu/vector.inl"

#include "cpu/activation.inl"

struct SiluGate {
  static Floats part(Floats v) { return sigmoid(v); }
  static Floats slope(Floats v, Floats s) { return s * (1.0f + v * (1.0f - s)); }
};

// 0.5 (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3))), which is a sigmoid.
struct TanhGeluGate {
  static Floats part(Floats v) { return sigmoid(1.5957691216057308f * v * (1.0f + 0.044715f * v * v)); }
  // s is 0 or 1 beyond 12, where the powers may be infinite; a NaN stays one. 1 - s would cancel.
  static Floats slope(Floats v, Floats s) {
    const Floats c = v < -12.0f ? all(-12.0f) : v > 12.0f ? all(12.0f) : v;
    return s * (1.0f + c * part(-c) * (1.5957691216057308f + 0.2140644488178084f * c * c));
  }
};

struct GeluGate {
  static Floats part(Floats v) { return Gelu::below(v); }
  static Floats slope(Floats v, Floats s) { return s + v * 0.39894228040143268f * exponential(v * v * -0.5f); }
};

template <class Body>
inline void with_gate(Gate gate, const Body& body) {
  if (gate == Gate::silu) {
    body(SiluGate{});
  } else if (gate == Gate::gelu_tanh) {
    body(TanhGeluGate{});
  } else {
    body(GeluGate{});
  }
}

// Rows of n elements; gate and up may be halves of a wider row, so each has its stride.
inline void swiglu_rows(const void* gate, const void* up, void* out, Type type, Gate which, int64_t n,
                        int64_t gate_stride, int64_t up_stride, int64_t first, int64_t last) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    using Value = typename T::Value;
    with_gate(which, [&](auto act) {
      for (int64_t m = first; m < last; ++m) {
        const Value *g = static_cast<const Value*>(gate) + m * gate_stride,
                    *u = static_cast<const Value*>(up) + m * up_stride;
        Value* y = static_cast<Value*>(out) + m * n;
        for (int64_t i = 0; i < n; i += kWidth) {
          const Floats v = load<T>(g + i, n - i);
          store<T>(y + i, v * act.part(v) * load<T>(u + i, n - i), n - i);
        }
      }
    });
  });
}

// dgate = dy * up * act'(gate), dup = dy * act(gate).
inline void swiglu_backward_rows(const void* dy, const void* gate, const void* up, void* dgate, void* dup, Type type,
                                 Gate which, int64_t n, int64_t gate_stride, int64_t up_stride, int64_t first,
                                 int64_t last) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    using Value = typename T::Value;
    with_gate(which, [&](auto act) {
      for (int64_t m = first; m < last; ++m) {
        const Value *g = static_cast<const Value*>(gate) + m * gate_stride,
                    *u = static_cast<const Value*>(up) + m * up_stride;
        const Value* d = static_cast<const Value*>(dy) + m * n;
        Value *dg = static_cast<Value*>(dgate) + m * n, *du = static_cast<Value*>(dup) + m * n;
        for (int64_t i = 0; i < n; i += kWidth) {
          const Floats v = load<T>(g + i, n - i), grad = load<T>(d + i, n - i), s = act.part(v);
          store<T>(du + i, grad * v * s, n - i);
          store<T>(dg + i, grad * load<T>(u + i, n - i) * act.slope(v, s), n - i);
        }
      }
    });
  });
}
