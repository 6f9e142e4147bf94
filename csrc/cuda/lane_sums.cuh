// Sums over the lanes of a warp.
#pragma once

#include "ptx.cuh"

namespace {

// Sums over each kLanes lanes, of kN values at once: lanes halve the values between them, so that kN - 1 shuffles do for
// the first kN lanes what would take log2(kN) for each value. Value summed_in(lane) + i is then in part[i] of a lane,
// i below kN / kLanes or 1. A value's terms are added in the same order whatever kN is.
template <int kLanes, int kBit = 1, int kN>
__device__ __forceinline__ void lane_sums(float (&part)[kN]) {
  constexpr int kSpread = kN < kLanes ? kN : kLanes, kLeft = kN / (kBit < kSpread ? 2 * kBit : kSpread);
  if constexpr (kBit < kLanes) {
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      if constexpr (kBit < kSpread) {
        const bool upper = lane_id() & kBit;
        const float given = upper ? part[i] : part[i + kLeft], kept = upper ? part[i + kLeft] : part[i];
        part[i] = kept + __shfl_xor_sync(0xffffffffu, given, kBit);
      } else {
        part[i] += __shfl_xor_sync(0xffffffffu, part[i], kBit);
      }
    }
    lane_sums<kLanes, 2 * kBit>(part);
  }
}

// The first of the values that a lane has the sum of. Where kN is at most kLanes it is its own inverse.
template <int kN, int kLanes>
__device__ __forceinline__ int summed_in(int lane) {
  constexpr int kSpread = kN < kLanes ? kN : kLanes;
  int value = 0;
#pragma unroll
  for (int n = kN / 2, bit = 1; bit < kSpread; n /= 2, bit *= 2) value += lane & bit ? n : 0;
  return value;
}

}  // namespace
