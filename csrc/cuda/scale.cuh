// The scale of a block of NF4 weights, double quantisation undone; tables and maths: csrc/nf4.h.
#pragma once

#include "launch.h"
#include "../nf4.h"

namespace {

template <int kSize>
struct Table {
  float value[kSize];
};

template <int kSize>
constexpr Table<kSize> copy_of(const float (&values)[kSize]) {
  Table<kSize> copy{};
  for (int i = 0; i < kSize; ++i) copy.value[i] = values[i];
  return copy;
}

// The tables of csrc/nf4.h where a thread can read them by an index of its own.
__device__ const Table<16> nf4_code = copy_of(pe::kNf4Code);
__device__ const Table<256> absmax_code = copy_of(pe::kAbsmaxCode);

// Scales of a weight: absmax in float32, or (nested_absmax not null) its 8-bit index.
struct Scales {
  const void* absmax;
  const float* nested_absmax;
  const float* offset;
  int shift;  // log2 of the block size

  __device__ __forceinline__ bool nested() const { return nested_absmax != nullptr; }

  // Two roundings, not one fused: bitsandbytes' bits.
  __device__ __forceinline__ float undo(uint32_t index, float nested) const {
    return __fadd_rn(__fmul_rn(__ldg(absmax_code.value + index), nested), __ldg(offset));
  }

  // The scale of a block; kNested is known where that saves a branch.
  template <bool kNested, typename Block>
  __device__ __forceinline__ float of(Block block) const {
    if (!kNested) return __ldg(static_cast<const float*>(absmax) + block);
    return undo(__ldg(static_cast<const uint8_t*>(absmax) + block), __ldg(nested_absmax + (block >> 8)));
  }
};

inline int log2_of(int blocksize) {
  int shift = 0;
  while ((1 << shift) < blocksize) ++shift;
  return shift;
}

inline bool is_blocksize(int blocksize) {
  return blocksize >= 64 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0;
}

}  // namespace
