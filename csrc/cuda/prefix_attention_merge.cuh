// From the states of a thread block to its part of the workspace, and from a target's parts to its rows of out: by the
// block that brings the last of them, in the order of the slots, whoever that is.
#pragma once

#include "arrivals.cuh"
#include "prefix_attention_keys.cuh"

namespace {

// The parts of a target, and of one slot of it.
struct Parts {
  float2* sums;   // (slots, rows)
  float* values;  // (slots, rows, head_dim)

  __device__ __forceinline__ Parts(const Call& call, int target, int slot, int rows) {
    const int64_t first = (int64_t{target} * call.plan.slots() + slot) * rows;
    sums = call.part_sums + first;
    values = call.parts + first * call.head_dim;
  }
};

// Of `count` softmaxes of one row, `apart` from each other: their largest score and their sum, and in their places what
// each is to be multiplied by.
template <typename T>
__device__ __forceinline__ float2 weigh(float2* states, int count, int apart) {
  float top = no_score(), total = 0.0f;
  for (int s = 0; s < count; ++s) top = fmaxf(top, states[s * apart].x);
  const float base = base_of(top);
  for (int s = 0; s < count; ++s) {
    const float weight = power<T>(states[s * apart].x - base);
    total = fmaf(states[s * apart].y, weight, total);
    states[s * apart].x = weight;
  }
  return make_float2(top, total);
}

// The same by a warp, which shares out the softmaxes among its lanes.
template <typename T>
__device__ __forceinline__ float2 weigh_together(float2* states, int count, int apart) {
  const int lane = threadIdx.x % 32;
  float top = no_score(), total = 0.0f;
  for (int s = lane; s < count; s += 32) top = fmaxf(top, states[s * apart].x);
  for (int other = 16; other > 0; other /= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, other));
  const float base = base_of(top);
  for (int s = lane; s < count; s += 32) {
    const float weight = power<T>(states[s * apart].x - base);
    total = fmaf(states[s * apart].y, weight, total);
    states[s * apart].x = weight;
  }
  for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, other);
  return make_float2(top, total);
}

// The block's part of each of its targets.
template <typename T, typename S, int kN, int kRows>
__device__ void store_parts(const Call& call, const Work& work, unsigned char* shared) {
  float2* tops = reinterpret_cast<float2*>(shared + S::kTopsAt);
  const float* sums = reinterpret_cast<const float*>(shared);
  const int mine = threadIdx.x;
  int b, row;
  if (mine < kN && work.place(call, mine, &b, &row)) {
    const Parts parts(call, target_of(call, work, b, kRows), work.slot, kRows);
    parts.sums[row - work.first_row] = weigh<T>(tops + mine, S::kStates, kN);
  }
  __syncthreads();  // the weights are there
  for (int i = threadIdx.x; i < kN * S::kD; i += kThreads) {
    const int d = i % S::kD;
    if (d >= call.head_dim || !work.place(call, i / S::kD, &b, &row)) continue;
    float total = 0.0f;
#pragma unroll
    for (int s = 0; s < S::kStates; ++s) {
      total = fmaf(sums[s * kN * S::kD + i], tops[s * kN + i / S::kD].x, total);
    }
    const Parts parts(call, target_of(call, work, b, kRows), work.slot, kRows);
    parts.values[(row - work.first_row) * call.head_dim + d] = total;
  }
}

// kWide values of a row of out, from those of all slots, `apart` from each other.
template <typename T, int kWide, int kRows>
__device__ __forceinline__ void add_up(const float* parts, int64_t apart, const float2* states, int slots, float scale,
                                       T* out) {
  float total[kWide] = {};
#pragma unroll 16
  for (int slot = 0; slot < slots; ++slot) {
    const float* from = parts + slot * apart;
    const float weight = states[slot * kRows].x;
    if constexpr (kWide == 4) {
      const float4 part = *reinterpret_cast<const float4*>(from);
      total[0] = fmaf(part.x, weight, total[0]), total[1] = fmaf(part.y, weight, total[1]);
      total[2] = fmaf(part.z, weight, total[2]), total[3] = fmaf(part.w, weight, total[3]);
    } else {
      total[0] = fmaf(*from, weight, total[0]);
    }
  }
#pragma unroll
  for (int i = 0; i < kWide; ++i) round_to(out + i, total[i] * scale);
}

// out and lse of a target whose parts are all there. It is one block's, at the end: what counts is how often it waits for
// memory in turn, so 16 slots are on their way at once, four values of each.
template <typename T, int kRows>
__device__ void finish(const Call& call, const Work& work, int b, unsigned char* shared) {
  const int slots = call.plan.slots(), rows = min(kRows, call.rows() - work.first_row);
  const Parts parts(call, target_of(call, work, b, kRows), 0, kRows);
  float2* states = reinterpret_cast<float2*>(shared);
  __syncthreads();  // what lay here before is no longer read
  for (int i = threadIdx.x; i < slots * kRows; i += kThreads) {
    if (i % kRows < rows) states[i] = parts.sums[i];
  }
  __syncthreads();
  for (int in_tile = threadIdx.x / 32; in_tile < rows; in_tile += kWarps) {
    const int row = work.first_row + in_tile, query = row / call.group;
    const int head = work.head * call.group + row % call.group;
    const float2 whole = weigh_together<T>(states + in_tile, slots, kRows);
    if (threadIdx.x % 32 != 0) continue;
    states[in_tile].y = whole.y == 0.0f ? 0.0f : 1.0f / whole.y;  // a row that sees nothing gives zeros
    call.lse[(int64_t{b} * call.kv_heads * call.group + head) * call.queries + query] =
        whole.y == 0.0f ? no_score() : log_of<T>(whole.x, whole.y);
  }
  __syncthreads();
  const bool fours = call.head_dim % 4 == 0;  // the workspace's parts then lie at multiples of 16 bytes
  const int wide = fours ? 4 : 1, groups = call.head_dim / wide;
  for (int i = threadIdx.x; i < rows * groups; i += kThreads) {
    const int in_tile = i / groups, d = i % groups * wide, row = work.first_row + in_tile;
    const float* values = parts.values + in_tile * call.head_dim + d;
    const int64_t apart = int64_t{kRows} * call.head_dim;
    T* out = static_cast<T*>(call.out) + b * call.out_batch +
             (work.head * call.group + row % call.group) * call.out_head + row / call.group * call.out_query + d;
    if (fours) {
      add_up<T, 4, kRows>(values, apart, states + in_tile, slots, states[in_tile].y, out);
    } else {
      add_up<T, 1, kRows>(values, apart, states + in_tile, slots, states[in_tile].y, out);
    }
  }
}

// Says that the block's parts are in the workspace, and finishes the targets of which they were the last.
template <typename T, typename S, int kRows>
__device__ void arrive(const Call& call, const Work& work, unsigned char* shared) {
  unsigned* last = reinterpret_cast<unsigned*>(shared + S::kFlagsAt);
  const int mine = threadIdx.x;
  __syncthreads();  // the parts are written
  if (mine < work.batches) {
    unsigned* counter = call.arrivals + target_of(call, work, work.batch + mine, kRows);
    last[mine] = arrive_last(counter, static_cast<unsigned>(call.plan.slots()));
  }
  __syncthreads();
  for (int i = 0; i < work.batches; ++i) {
    if (last[i]) finish<T, kRows>(call, work, work.batch + i, shared);
  }
}

}  // namespace
