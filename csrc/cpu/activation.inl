// Activations and their derivatives, kWidth values at a time. Included once per instruction set, after vector.inl.

struct Relu {
  static Floats value(Floats v) { return v < 0.0f ? all(0.0f) : v; }
  static Floats slope(Floats v) { return v <= 0.0f ? all(0.0f) : all(1.0f); }
};

inline Floats sigmoid(Floats v) { return 1.0f / (1.0f + exponential(-v)); }

struct Silu {
  static Floats value(Floats v) { return v / (1.0f + exponential(-v)); }
  static Floats slope(Floats v) {
    const Floats s = sigmoid(v);
    return s * (1.0f + v * (1.0f - s));
  }
};

struct Tanh {
  // Near zero a polynomial in v^2 (Cephes, tanhf), else 1 - 2 / (e^2|v| + 1).
  static Floats value(Floats v) {
    const Floats size = v < 0.0f ? -v : v, square = v * v;
    Floats p = all(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const Floats near = p * square * v + v, far = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
    return size < 0.625f ? near : v < 0.0f ? -far : far;
  }
  // 1 - tanh^2, without the difference, of which little is left where tanh is near one.
  static Floats slope(Floats v) {
    const Floats e = exponential((v < 0.0f ? v : -v) * 2.0f), sum = 1.0f + e;
    return 4.0f * e / (sum * sum);
  }
};

struct Gelu {
  // The normal distribution's P(X < v). With t = |v| / sqrt(2): a polynomial for erf(t) near zero, and beyond it one
  // for log(1 - erf(t)), so that the tail of negative v keeps its digits (Juffa's erff, errors below a unit).
  static Floats below(Floats v) {
    const Floats scaled = v * 0.70710678118654752f, t = scaled < 0.0f ? -scaled : scaled, s = scaled * scaled;
    Floats far = -1.72853470e-5f * t + 3.83197126e-4f;
    far = far * s + (-3.88396438e-3f * t + 2.42546219e-2f);
    far = far * t - 1.06777877e-1f;
    far = far * t - 6.34846687e-1f;
    far = far * t - 1.28717512e-1f;
    const Floats tail = 0.5f * exponential(far * t - t);
    Floats near = all(-5.96761703e-4f);
    near = near * s + 4.99119423e-3f;
    near = near * s - 2.67681349e-2f;
    near = near * s + 1.12819925e-1f;
    near = near * s - 3.76125336e-1f;
    near = near * s + 1.28379166e-1f;
    near = 0.5f + 0.5f * (near * scaled + scaled);
    return t > 0.927734375f ? (v > 0.0f ? 1.0f - tail : tail) : near;
  }
  static Floats value(Floats v) { return v * below(v); }
  static Floats slope(Floats v) { return below(v) + v * 0.39894228040143268f * exponential(v * v * -0.5f); }
};
