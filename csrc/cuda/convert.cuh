// The numbers that kernels read and write, to and from float32, one by one and 16 bytes at a time.
#pragma once

#include "launch.h"
#include "ptx.cuh"

namespace {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void round_to(float* to, float value) { *to = value; }
// By a variable: g++'s ThreadSanitizer does not see a function's result go to memory.
__device__ __forceinline__ void round_to(__half* to, float value) {
  const __half narrow = __float2half_rn(value);
  *to = narrow;
}
__device__ __forceinline__ void round_to(__nv_bfloat16* to, float value) {
  const __nv_bfloat16 narrow = __float2bfloat16_rn(value);
  *to = narrow;
}

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ uint32_t bits_of(__half value) { return __half_as_ushort(value); }
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

// The numbers that lie in 16 bytes.
__device__ __forceinline__ void widen_words(float, const uint4& words, float* to) {
  to[0] = __uint_as_float(words.x), to[1] = __uint_as_float(words.y);
  to[2] = __uint_as_float(words.z), to[3] = __uint_as_float(words.w);
}
__device__ __forceinline__ void widen_words(__half, const uint4& words, float* to) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word[i]));
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}
__device__ __forceinline__ void widen_words(__nv_bfloat16, const uint4& words, float* to) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(word[i] << 16), to[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
  }
}

// 16 bytes of numbers, of which `left` are there and the rest become 0. kAligned: they start at a multiple of 16 bytes,
// and are all there or not at all. kOnce: past L1.
template <bool kAligned, bool kOnce, typename E>
__device__ __forceinline__ void load_numbers(uint4& to, const E* from, int left) {
  constexpr int kPer16 = 16 / sizeof(E), kPerWord = 4 / sizeof(E);
  to = make_uint4(0, 0, 0, 0);
  if constexpr (kAligned && kOnce) {
    load_stream_16(to, from, left > 0);
  } else if constexpr (kAligned) {
    load_16(to, from, left > 0);
  } else {
#pragma unroll 1  // to be little code: it is rare
    for (int i = 0; i < kPer16; i += kPerWord) {
      uint32_t word = i < left ? bits_of(from[i]) : 0;
      if (kPerWord == 2 && i + 1 < left) word |= bits_of(from[i + 1]) << 16;
      to = make_uint4(to.y, to.z, to.w, word);
    }
  }
}

}  // namespace
