// A piece of the middle: m = z Wd^T + bd for kTile of the width and all rows, and what it becomes by the activation.
//
// A thread has 16 bytes of x at a time, the same columns of every row, and of Wd the columns that go with them. Its sums
// meet those of its warp by shuffles and those of the block in shared memory, always in the same order: a row's result
// does not depend on how many rows there are.
#pragma once

#include "bottleneck_call.cuh"

namespace {

template <typename T, typename W, int kN>
struct Down {
  static constexpr int kVector = 16 / sizeof(T);           // columns of a thread at a time
  static constexpr int kWords = kVector * sizeof(W) / 16;  // 16 bytes of Wd for as many
  static constexpr int kPerWords = 16 / sizeof(W);
  static constexpr int kStep = kThreads * kVector;
  static constexpr int kAhead = kN <= 4 ? 2 : 1;  // steps that are asked for together, by the registers

  const Call& call;
  unsigned char* const shared;
  float* const of_warps = reinterpret_cast<float*>(shared);
  float2* const stats = reinterpret_cast<float2*>(shared + Memory<kN>::kStatsAt);
  const T* const x = static_cast<const T*>(call.x);

  // 16 bytes of each row, from column k on.
  template <bool kAligned>
  __device__ __forceinline__ void load_x(uint4 (&to)[kN], int k) const {
#pragma unroll
    for (int m = 0; m < kN; ++m) {
      const bool there = m < call.rows && k < call.features;
      load_numbers<kAligned, false>(to[m], x + (there ? int64_t{m} * call.features + k : 0),
                                    there ? call.features - k : 0);
    }
  }

  // The sums over the block of each thread's values: thread i has that of value i. A barrier must follow.
  template <int kValues>
  __device__ __forceinline__ float block_sum(float (&part)[kValues]) const {
    static_assert(kValues <= 32);
    const int lane = lane_id(), warp = threadIdx.x / 32;
    lane_sums<32>(part);
    if (lane < kValues) of_warps[warp * kValues + summed_in<kValues, 32>(lane)] = part[0];
    __syncthreads();  // the warps' sums are there
    float total = 0.0f;
    if (static_cast<int>(threadIdx.x) < kValues) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += of_warps[w * kValues + threadIdx.x];
    }
    return total;
  }

  // Mean and 1 / sqrt(variance + eps) of the rows. Two passes: E[x^2] - E[x]^2 would cancel.
  template <bool kAligned>
  __device__ __forceinline__ void take_statistics() {
    const int mine = threadIdx.x;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      float sum[kN] = {};
#pragma unroll 1
      for (int k = threadIdx.x * kVector; k < call.features; k += kStep) {
        uint4 words[kN];
        load_x<kAligned>(words, k);
#pragma unroll
        for (int m = 0; m < kN; ++m) {
          if (m >= call.rows) break;
          const float mean = pass == 0 ? 0.0f : stats[m].x;
          float value[kVector];
          widen_words(T(), words[m], value);
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const float off = k + i < call.features ? __fsub_rn(value[i], mean) : 0.0f;
            sum[m] = pass == 0 ? __fadd_rn(sum[m], off) : fmaf(off, off, sum[m]);
          }
        }
      }
      const float of_row = block_sum(sum) / static_cast<float>(call.features);
      if (mine < kN && pass == 0) stats[mine].x = of_row;
      if (mine < kN && pass == 1) stats[mine].y = 1.0f / sqrtf(__fadd_rn(of_row, call.eps));
      __syncthreads();  // they are there
    }
  }

  // Numbers of the norm's weight or bias, from column k on.
  __device__ __forceinline__ void load_norm(float (&to)[kVector], const void* from, int k) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool there = from != nullptr && k + i < call.features;
      to[i] = !there           ? 0.0f
              : call.wide_norm ? __ldg(static_cast<const float*>(from) + k + i)
                               : widen(static_cast<const T*>(from)[k + i]);
    }
  }

  template <bool kAligned>
  __device__ __forceinline__ void multiply(unsigned piece, float (&sum)[kTile * kN]) const {
    const bool norm = call.norm_weight != nullptr;
    const int first = static_cast<int>(piece) * kTile;
    const W* weight = static_cast<const W*>(call.down_weight);
#pragma unroll 1
    for (int start = threadIdx.x * kVector; start < call.features; start += kAhead * kStep) {
      uint4 w[kAhead][kTile][kWords], words[kAhead][kN];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int k = start + u * kStep;
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
#pragma unroll
          for (int i = 0; i < kWords; ++i) {
            const int column = k + i * kPerWords;
            const bool there = first + t < call.width && column < call.features;
            load_numbers<kAligned, true>(w[u][t][i], weight + (there ? int64_t{first + t} * call.features + column : 0),
                                         there ? call.features - column : 0);
          }
        }
        load_x<kAligned>(words[u], k);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int k = start + u * kStep;
        float of_weight[kTile][kVector], scale[kVector], shift[kVector];
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
#pragma unroll
          for (int i = 0; i < kWords; ++i) widen_words(W(), w[u][t][i], of_weight[t] + i * kPerWords);
        }
        if (norm) {
          load_norm(scale, call.norm_weight, k);
          load_norm(shift, call.norm_bias, k);
        }
#pragma unroll
        for (int m = 0; m < kN; ++m) {
          if (m >= call.rows) break;
          float z[kVector];
          widen_words(T(), words[u][m], z);
          if (norm) {
            const float2 of_row = stats[m];
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              const float normal = __fmul_rn(__fsub_rn(z[i], of_row.x), of_row.y);
              z[i] = rounded<W>(fmaf(normal, scale[i], shift[i]));
            }
          }
#pragma unroll
          for (int t = 0; t < kTile; ++t) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) sum[t * kN + m] = fmaf(z[i], of_weight[t][i], sum[t * kN + m]);
          }
        }
      }
    }
  }

  // The middle of a piece, and the activated middle in the workspace, whose padding the last piece makes 0.
  __device__ __forceinline__ void store(unsigned piece, float total) const {
    const int mine = threadIdx.x;
    if (mine >= kTile * kN) return;
    const int r = static_cast<int>(piece) * kTile + mine / kN, m = mine % kN, stride = padded<W>(call.width);
    if (m >= call.rows || r >= call.width) return;
    W* const middle = static_cast<W*>(call.middle) + int64_t{m} * call.width + r;
    W* const activated = static_cast<W*>(call.activated) + m * stride;
    const float value = rounded<W>(total + bias_at<W>(call.down_bias, r));
    round_to(middle, value);
    round_to(activated + r, activate(call.activation, value));
    if (r == call.width - 1) {
      for (int i = call.width; i < stride; ++i) round_to(activated + i, 0.0f);
    }
  }

  template <bool kAligned>
  __device__ __forceinline__ void run(unsigned piece) const {
    float sum[kTile * kN] = {};
    multiply<kAligned>(piece, sum);
    store(piece, block_sum(sum));
    __syncthreads();  // the piece is written
    if (threadIdx.x == 0) arrive(&call.counters->done);
  }

  // Pieces, as long as there are some; the number of the next is asked for ahead of the work on one.
  template <bool kAligned>
  __device__ __forceinline__ void run_from(unsigned number) {
    unsigned* flag = reinterpret_cast<unsigned*>(shared + Memory<kN>::kFlagAt);
    if (number >= call.pieces) return;
    if (call.norm_weight != nullptr) {
      take_statistics<kAligned>();
      const int mine = threadIdx.x;
      if (number == 0 && mine < call.rows) {
        call.stats[2 * mine] = stats[mine].x, call.stats[2 * mine + 1] = stats[mine].y;
      }
    }
    const unsigned draws = call.pieces + gridDim.x;
    while (number < call.pieces) {
      number = number_by_start(&call.counters->started, draws, flag, [&] { run<kAligned>(number); });
    }
  }
};

}  // namespace
