// Columns of y: residual + scaling (a Wu^T + bu), of the activated middle a of all rows, which lies in shared memory.
//
// kColumnLanes lanes share a row of Wu, 16 bytes each at a time, so that neighbouring lanes read neighbouring bytes and a
// narrow middle leaves no lane idle. A tile's first bytes are asked for before the middle is there.
#pragma once

#include "bottleneck_call.cuh"

namespace {

template <typename T, typename W, int kN>
struct Up {
  static constexpr int kPer16 = 16 / sizeof(W);
  static constexpr int kStep = kColumnLanes * kPer16;  // of the width, in the lanes of a column
  static constexpr int kAhead = 4;                     // steps
  static constexpr int kStride = Memory<kN>::kStride;
  static constexpr int kResults = (kN * kColumns + kThreads - 1) / kThreads;  // of y in a thread

  const Call& call;
  unsigned char* const shared;
  float* const sums = reinterpret_cast<float*>(shared);
  const W* const activated = reinterpret_cast<const W*>(shared + Memory<kN>::kActivatedAt);
  const int in_tile = threadIdx.x / kColumnLanes, part = threadIdx.x % kColumnLanes;
  uint4 words[kAhead];
  float base[kResults], bias[kResults];

  template <bool kAligned>
  __device__ __forceinline__ void load(unsigned tile, int r) {
    const int64_t column = int64_t{tile} * kColumns + in_tile;
    const W* from = static_cast<const W*>(call.up_weight);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = r + i * kStep;
      const bool there = column < call.features && at < call.width;
      load_numbers<kAligned, true>(words[i], from + (there ? column * call.width + at : 0),
                                   there ? call.width - at : 0);
    }
  }

  // Row and column of a thread's result i; whether there is such a one.
  __device__ __forceinline__ bool place(unsigned tile, int i, int* m, int64_t* column) const {
    const int number = threadIdx.x + i * kThreads;
    *m = number / kColumns, *column = int64_t{tile} * kColumns + number % kColumns;
    return *m < call.rows && *column < call.features;
  }

  // Asks for what a tile needs but for the middle.
  template <bool kAligned>
  __device__ __forceinline__ void begin(unsigned tile) {
    load<kAligned>(tile, part * kPer16);
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      int m;
      int64_t column;
      const bool there = place(tile, i, &m, &column);
      base[i] = there ? widen(static_cast<const T*>(call.residual)[m * int64_t{call.features} + column]) : 0.0f;
      bias[i] = there ? bias_at<W>(call.up_bias, column) : 0.0f;
    }
  }

  __device__ __forceinline__ void multiply(int r, float (&sum)[kN]) const {
    const int stride = padded<W>(call.width);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = r + i * kStep;
      if (at >= call.width) break;
      float weight[kPer16];
      widen_words(W(), words[i], weight);
#pragma unroll
      for (int m = 0; m < kN; ++m) {
        if (m >= call.rows) break;
        float a[kPer16];
        widen_words(W(), *reinterpret_cast<const uint4*>(activated + m * stride + at), a);
#pragma unroll
        for (int j = 0; j < kPer16; ++j) sum[m] = fmaf(a[j], weight[j], sum[m]);
      }
    }
  }

  // A tile that was begun.
  template <bool kAligned>
  __device__ __forceinline__ void finish(unsigned tile) {
    float sum[kN] = {};
    int r = part * kPer16;
    multiply(r, sum);
#pragma unroll 1
    for (r += kAhead * kStep; r < call.width; r += kAhead * kStep) {
      load<kAligned>(tile, r);
      multiply(r, sum);
    }
    __syncwarp();
    lane_sums<kColumnLanes>(sum);
    constexpr int kEach = kN > kColumnLanes ? kN / kColumnLanes : 1;
    if (part < kN) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        sums[(summed_in<kN, kColumnLanes>(part) + i) * kStride + in_tile] = sum[i];
      }
    }
    __syncthreads();  // the sums are there
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      int m;
      int64_t column;
      if (!place(tile, i, &m, &column)) continue;
      const float raised = __fadd_rn(sums[m * kStride + (threadIdx.x + i * kThreads) % kColumns], bias[i]);
      round_to(static_cast<T*>(call.y) + m * int64_t{call.features} + column, fmaf(call.scaling, raised, base[i]));
    }
    __syncthreads();  // they may be written again
  }

  // When all pieces of the middle are there.
  __device__ __forceinline__ void bring_middle() {
    Counters* counters = call.counters;
    if (threadIdx.x == 0) {
      wait_for(&counters->done, call.pieces);
      // Whoever is last to have seen them makes the counters ready for the next launch.
      if (atomicAdd(&counters->seen, 1u) == gridDim.x - 1) {
        __threadfence();
        counters->seen = 0, counters->done = 0;
      }
    }
    __syncthreads();  // the middle may be read
    const int count = call.rows * padded<W>(call.width) / kPer16;
    uint4* const to = reinterpret_cast<uint4*>(shared + Memory<kN>::kActivatedAt);
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kThreads) to[i] = static_cast<const uint4*>(call.activated)[i];
    __syncthreads();  // it is in shared memory
  }

  template <bool kAligned>
  __device__ __forceinline__ void run() {
    unsigned tile = blockIdx.x;
    if (tile < call.tiles) begin<kAligned>(tile);
    bring_middle();
    while (tile < call.tiles) {
      finish<kAligned>(tile);
      tile += gridDim.x;
      if (tile < call.tiles) begin<kAligned>(tile);
    }
  }
};

}  // namespace
