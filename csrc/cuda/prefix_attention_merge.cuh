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

// out and lse of a target whose parts are all there.
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
  if (static_cast<int>(threadIdx.x) < rows) {
    const int row = work.first_row + threadIdx.x, query = row / call.group;
    const int head = work.head * call.group + row % call.group;
    const float2 whole = weigh<T>(states + threadIdx.x, slots, kRows);
    states[threadIdx.x].y = whole.y == 0.0f ? 0.0f : 1.0f / whole.y;  // a row that sees nothing gives zeros
    call.lse[(int64_t{b} * call.kv_heads * call.group + head) * call.queries + query] =
        whole.y == 0.0f ? no_score() : log_of<T>(whole.x, whole.y);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * call.head_dim; i += kThreads) {
    const int in_tile = i / call.head_dim, d = i % call.head_dim, row = work.first_row + in_tile;
    float total = 0.0f;
#pragma unroll 8
    for (int slot = 0; slot < slots; ++slot) {
      const float part = parts.values[(int64_t{slot} * kRows + in_tile) * call.head_dim + d];
      total = fmaf(part, states[slot * kRows + in_tile].x, total);
    }
    const int64_t to = b * call.out_batch + (work.head * call.group + row % call.group) * call.out_head +
                       row / call.group * call.out_query;
    round_to(static_cast<T*>(call.out) + to + d, total * states[in_tile].y);
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
