// NF4 quantise and dequantise of flat arrays. Floor: bytes moved, 2.56 a weight for bf16 (2 + 0.5 + the scales).

#include "cpu/nf4_decode.inl"

// Indices of n values times `factor` (or over it, where `divide`), one a byte. bitsandbytes multiplies full blocks by
// 1 / absmax and divides a short last one by it; the two differ in the last bit.
inline void encode(const float* values, int n, float factor, bool divide, uint8_t* index) {
  float boundary[15];
  for (int c = 0; c < 15; ++c) boundary[c] = (kNf4Code[c + 1] + kNf4Code[c]) / 2;
  int32_t found[64];
  for (int start = 0; start < n; start += 64) {
    const int count = n - start < 64 ? n - start : 64;
    for (int j = 0; j < count; ++j) {
      const float v = divide ? values[start + j] / factor : values[start + j] * factor;
      int32_t above = 0;
      for (int c = 0; c < 15; ++c) above += v > boundary[c];
      found[j] = above;
    }
    for (int j = 0; j < count; ++j) index[start + j] = static_cast<uint8_t>(found[j]);
  }
}

// Blocks [begin, end) of `blocksize` values out of n.
inline void quantize(const void* weight, Type type, int64_t n, int blocksize, int64_t begin, int64_t end,
                     uint8_t* packed, float* absmax) {
  constexpr float kSmallest = 1e-38f;
  float values[4096];
  uint8_t index[4096 + 1];
  for (int64_t b = begin; b < end; ++b) {
    const int64_t start = b * blocksize;
    const int count = static_cast<int>(n - start < blocksize ? n - start : blocksize);
    for (int j = 0; j < count; j += 16)
      load_up_to_16(weight, type, start + j, count - j < 16 ? count - j : 16, values + j);
    int32_t magnitude = 0;  // as integers float magnitudes order the same, and inf and NaN are above all: they stay
    for (int j = 0; j < count; ++j) {
      int32_t bits;
      memcpy(&bits, values + j, 4);
      bits &= 0x7FFFFFFF;
      magnitude = bits > magnitude ? bits : magnitude;
    }
    float largest;
    memcpy(&largest, &magnitude, 4);
    const bool full = count == blocksize;
    const float divisor = largest < kSmallest ? kSmallest : largest;
    absmax[b] = full ? largest : divisor;
    encode(values, count, full ? 1.0f / divisor : divisor, !full, index);
    index[count] = 7;  // an odd count: the spare nibble holds zero
    for (int j = 0; j < count; j += 2) packed[(start + j) >> 1] = static_cast<uint8_t>(index[j] << 4 | index[j + 1]);
  }
}

// Flat values [begin, end) of w, begin a multiple of 64, to out. `stream`: past the cache, for outputs larger than it.
inline void dequantize(const Matrix& w, Type type, int64_t begin, int64_t end, void* out, bool stream) {
  int64_t i = begin;
#if PE_LEVEL >= 2
  if (type != Type::f32) {
    uint16_t* to = static_cast<uint16_t*>(out);
    for (; i + 64 <= end; i += 64) {
      __m512i first, second;
      if (type == Type::bf16) decode64_half<false, true>(w, i, &first, &second);
      else decode64_half<false, false>(w, i, &first, &second);
      if (stream) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), first);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i + 32), second);
      } else {
        _mm512_storeu_si512(to + i, first);
        _mm512_storeu_si512(to + i + 32, second);
      }
    }
    if (stream) _mm_sfence();
  }
#endif
  float values[64];
  for (; i + 64 <= end; i += 64) {
    if (type == Type::f32) {
      decode64(w, i, static_cast<float*>(out) + i);
    } else {
      decode64(w, i, values);
      for (int j = 0; j < 64; j += 16) store_up_to_16(out, type, i + j, 16, values + j);
    }
  }
  if (i < end) {
    const int count = static_cast<int>(end - i);
    decode_any(w, i, count, values);
    for (int j = 0; j < count; ++j) store_one(out, type, i + j, values[j]);
  }
}
