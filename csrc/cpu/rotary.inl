// y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2 over the two halves of the rotated part of each head, in float; the rest of a
// head is copied. The backward is the transposed rotation: dx1 = dy1 c1 + dy2 s2, dx2 = dy2 c2 - dy1 s1.
#include "cpu/vector.inl"

// Tokens first .. last of the B x T tokens.
inline void rotary_tokens(const Heads& x, const Angles& angles, Type type, int64_t tokens, int64_t head_dim,
                          int64_t rotated, bool transposed, int64_t first, int64_t last) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    using Value = typename T::Value;
    const int64_t half = rotated / 2;
    for (int64_t token = first; token < last; ++token) {
      const int64_t b = token / tokens, pos = token % tokens;
      const Value* c = static_cast<const Value*>(angles.cos) + b * angles.batch_stride + pos * rotated;
      const Value* s = static_cast<const Value*>(angles.sin) + b * angles.batch_stride + pos * rotated;
      for (int64_t h = 0; h < x.heads; ++h) {
        const Value* in = static_cast<const Value*>(x.in) + b * x.stride_b + h * x.stride_h + pos * x.stride_t;
        Value* out = static_cast<Value*>(x.out) + (token * x.heads + h) * head_dim;
        for (int64_t i = 0; i < half; i += kWidth) {
          const int64_t n = half - i;
          const Floats a = load<T>(in + i, n), z = load<T>(in + half + i, n);
          Floats s1 = load<T>(s + i, n), s2 = load<T>(s + half + i, n);
          if (transposed) {
            const Floats swapped = -s1;
            s1 = -s2;
            s2 = swapped;
          }
          store<T>(out + i, a * load<T>(c + i, n) - z * s1, n);
          store<T>(out + half + i, z * load<T>(c + half + i, n) + a * s2, n);
        }
        if (rotated < head_dim) memcpy(out + rotated, in + rotated, (head_dim - rotated) * sizeof(Value));
      }
    }
  });
}
