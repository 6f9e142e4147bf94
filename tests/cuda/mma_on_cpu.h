// mma.sync of a warp on the CPU: D = A B + C, A of 16 rows, B of 8 columns (PTX ISA, "Matrix Fragments for
// mma.m16n8k16" and "for mma.m16n8k8"). Products are exact in float32, sums are in float32.
//
// Lane l is in group g = l / 4 and has place q = l % 4 there. A register holds two elements, the first in its low half:
//   A  register i:  row g + 8 (i % 2),  columns 2 q + 8 (i / 2) and the next
//   B  register i:  rows 2 q + 8 i and the next,  column g
//   C and D, float i:  row g + 8 (i / 2),  column 2 q + i % 2
#pragma once

#include "launch_on_cpu.h"

namespace pe_cpu {

template <int kAWords, float (*kValue)(uint16_t)>
void mma(float d[4], const uint32_t* a, const uint32_t* b, const float c[4]) {
  constexpr int kK = 4 * kAWords, kBWords = kAWords / 2, kWords = (kAWords + kBWords + 1) / 2;
  uint64_t mine[kWords] = {}, all[32 * kWords];
  for (int i = 0; i < kAWords; ++i) mine[i / 2] |= static_cast<uint64_t>(a[i]) << 32 * (i % 2);
  for (int i = kAWords; i < kAWords + kBWords; ++i) {
    mine[i / 2] |= static_cast<uint64_t>(b[i - kAWords]) << 32 * (i % 2);
  }
  exchange(Collective::mma, 0xffffffffu, mine, kWords, all);

  auto element = [&](int lane, int word, int half) {
    const uint32_t both = static_cast<uint32_t>(all[lane * kWords + word / 2] >> 32 * (word % 2));
    return kValue(static_cast<uint16_t>(both >> 16 * half));
  };
  const int lane = self->rank % 32, g = lane / 4, q = lane % 4;
  float sums[4] = {c[0], c[1], c[2], c[3]};
  for (int k = 0; k < kK; ++k) {
    const int place = k % 8 / 2, half = k % 2, eight = k / 8;  // the lane of a group that holds k, and where
    for (int column = 0; column < 2; ++column) {
      const float from_b = element((2 * q + column) * 4 + place, kAWords + eight, half);
      for (int row = 0; row < 2; ++row) {
        sums[2 * row + column] += element(g * 4 + place, row + 2 * eight, half) * from_b;
      }
    }
  }
  for (int i = 0; i < 4; ++i) d[i] = sums[i];
}

inline void mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], const float c[4]) {
  mma<4, bfloat16_value>(d, a, b, c);
}
inline void mma_m16n8k16_f16(float d[4], const uint32_t a[4], const uint32_t b[2], const float c[4]) {
  mma<4, half_value>(d, a, b, c);
}
inline void mma_m16n8k8_f16(float d[4], const uint32_t a[2], const uint32_t b[1], const float c[4]) {
  mma<2, half_value>(d, a, b, c);
}

}  // namespace pe_cpu
