// What the kernel of bottleneck.cu is called with, its shared memory, and the activations.
#pragma once

#include "arrivals.cuh"
#include "convert.cuh"
#include "lane_sums.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxRows = 16;
constexpr int kMaxWidth = 512;
constexpr int kTile = 2;                           // rows of Wd in a piece
constexpr int kColumnLanes = 8;                    // that share a row of Wu
constexpr int kColumns = kThreads / kColumnLanes;  // of y at a time

enum Activation : int { kRelu = 0, kGelu = 1, kSilu = 2, kTanh = 3 };

struct Counters {
  unsigned started;  // numbers drawn: a piece each, then no more
  unsigned done;     // pieces of which the middle is there
  unsigned seen;     // thread blocks that have seen them all
};

struct Call {
  const void* x;         // (rows, features)
  const void* residual;  // the same, or x
  int rows, features;
  const void* down_weight;  // (width, features)
  const void* down_bias;
  const void* up_weight;  // (features, width)
  const void* up_bias;
  int width;
  const void* norm_weight;  // (features), or null: no norm
  const void* norm_bias;
  bool wide_norm;  // float32, not x's dtype
  float eps;
  int activation;
  float scaling;
  void* y;
  void* middle;  // (rows, width)
  float* stats;  // (rows, 2)
  Counters* counters;
  void* activated;    // (rows, width padded), of the weights' dtype
  bool aligned_down;  // rows of x and of Wd start at multiples of 16 bytes, and end there
  bool aligned_up;    // those of Wu
  unsigned pieces;    // of the middle
  unsigned tiles;     // of y
};

// Shared memory: sums that warps or lanes exchange, the statistics of rows, a flag; then the activated middle.
template <int kN>
struct Memory {
  static constexpr int kStride = kColumns + 1;  // of y's sums: rows start at different banks
  static constexpr int kSums = kWarps * kTile * kN > kN* kStride ? kWarps * kTile * kN : kN * kStride;
  static constexpr int kStatsAt = 4 * kSums;
  static constexpr int kFlagAt = kStatsAt + 8 * kN;
  static constexpr int kActivatedAt = (kFlagAt + 4 + 15) / 16 * 16;
};

// The width with what fills it up to whole 16 bytes.
template <typename W>
__host__ __device__ int padded(int width) {
  constexpr int kPer16 = 16 / sizeof(W);
  return (width + kPer16 - 1) / kPer16 * kPer16;
}

template <typename W>
__device__ __forceinline__ float rounded(float value) {
  W narrow;
  round_to(&narrow, value);
  return widen(narrow);
}

// A parameter of the weights' dtype that may not be there.
template <typename W>
__device__ __forceinline__ float bias_at(const void* bias, int64_t i) {
  return bias == nullptr ? 0.0f : widen(static_cast<const W*>(bias)[i]);
}

__device__ __forceinline__ float activate(int activation, float m) {
  switch (activation) {
    case kRelu:
      return m <= 0.0f ? 0.0f : m;  // not fmaxf: a NaN stays one
    case kGelu:
      return __fmul_rn(0.5f * m, __fadd_rn(1.0f, erff(m * 0.7071067811865476f)));
    case kSilu:
      return m / (1.0f + expf(-m));
    default:
      return tanhf(m);
  }
}

}  // namespace
