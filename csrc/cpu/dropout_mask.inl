// Dropout without a mask in memory; the mask is that of peft_engine/ops/dropout.py. Included once per instruction set, behind
// vector.inl.

// Element (row, column) is kept when its hash is not below the threshold.
struct Dropout {
  bool on = false;
  uint32_t threshold = 0;
  uint64_t seed = 0;
  float scale = 1.0f;  // 1 / (1 - p)

  // Of one word or of a vector of them.
  template <class Word>
  static Word mix(Word h) {
    h = (h ^ h >> 16) * 0x85EBCA6Bu;
    h = (h ^ h >> 13) * 0xC2B2AE35u;
    return h ^ h >> 16;
  }
  uint32_t row_key(int64_t row) const {
    const uint64_t r = static_cast<uint64_t>(row);
    const uint32_t high = mix(static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(r >> 32));
    return mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(r) ^ high));
  }
  // All ones where (key's row, column) is kept, else zero.
  uint32_t keep(uint32_t key, int64_t column) const {
    return mix(key + static_cast<uint32_t>(column) * 0x9E3779B9u) >= threshold ? 0xFFFFFFFFu : 0u;
  }
  // The same of kWidth columns, from `column` on.
  PE_INLINE Ints keep_vector(uint32_t key, int64_t column) const {
    Words lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i * 0x9E3779B9u;
    return mix(lane + (key + static_cast<uint32_t>(column) * 0x9E3779B9u)) >= threshold;
  }
};

// Of a call's arguments, which have dropout_p, threshold and seed.
template <class Arguments>
inline Dropout dropout_of(const Arguments& x) {
  Dropout d;
  d.on = x.dropout_p > 0.0;
  if (d.on) {
    d.threshold = x.threshold;
    d.seed = x.seed;
    d.scale = static_cast<float>(1.0 / (1.0 - x.dropout_p));
  }
  return d;
}
