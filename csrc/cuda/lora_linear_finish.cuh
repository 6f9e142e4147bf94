// The end of a tile of y, by the thread block that was the last to deliver to it:
// y = (sum of its segments, in order) + bias + scaling * h B^T, rounded once.
#pragma once

#include "lora_linear_call.cuh"
#include "ptx.cuh"

namespace {

// A thread has one column of y, and 8 rows at a time.
template <typename T, int kXTiles>
__device__ void finish_tile(const Call& call, unsigned tile, unsigned char* shared) {
  static_assert(kTileRows == kThreads);
  constexpr int64_t kSegment = static_cast<int64_t>(8) * kXTiles * kTileRows;
  float* h = reinterpret_cast<float*>(shared + Memory<kXTiles>::kHAt);
  const int rank = call.rank;
  __syncthreads();  // what lay here before is no longer read
  for (int i = threadIdx.x; i < call.rows * rank; i += kThreads) h[i] = call.workspace.h[i];
  __syncthreads();

  const unsigned first = call.plan.worker_of(tile * call.plan.units);
  const unsigned last = call.plan.worker_of((tile + 1) * call.plan.units - 1);
  const int64_t n = static_cast<int64_t>(tile) * kTileRows + threadIdx.x;
  if (n >= call.n) return;
  const float bias = call.bias == nullptr ? 0.0f : widen(static_cast<const T*>(call.bias)[n]);
  for (int row = 0; row < call.rows; row += 8) {
    float sum[8] = {}, adapter[8] = {};
    const float* segment = call.workspace.segments + (first + tile) * kSegment + row * kTileRows + threadIdx.x;
#pragma unroll 4
    for (unsigned worker = first; worker <= last; ++worker, segment += kSegment) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (row + i < call.rows) sum[i] += segment[i * kTileRows];
      }
    }
#pragma unroll 4
    for (int r = 0; r < rank; ++r) {
      const float b = load_adapter<T>(call, call.lora_b, n * rank + r);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (row + i < call.rows) adapter[i] = fmaf(h[(row + i) * rank + r], b, adapter[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (row + i >= call.rows) break;
      const float value = rank > 0 ? fmaf(call.scaling, adapter[i], sum[i] + bias) : sum[i] + bias;
      round_to(static_cast<T*>(call.y) + (row + i) * call.n + n, value);
    }
  }
}

// Says that one segment of a tile is in the workspace, and finishes the tile if it was the last: with an adapter when h is
// there, which blocks compute that started before this one (number_by_start) and wait for nobody.
template <typename T, int kXTiles>
__device__ void deliver_segment(const Call& call, unsigned tile, unsigned char* shared) {
  const unsigned first = call.plan.worker_of(tile * call.plan.units);
  const unsigned last = call.plan.worker_of((tile + 1) * call.plan.units - 1);
  unsigned* flag = reinterpret_cast<unsigned*>(shared + Memory<kXTiles>::kFlagsAt);
  if (last_to_arrive(call.workspace.tile_arrivals + tile, last - first + 1, flag)) {
    if (call.rank > 0 && threadIdx.x == 0) {
      wait_for(call.workspace.h_there, 1);
      // The last to have seen h makes the counters ready for the next launch.
      const bool all = atomicAdd(call.workspace.tiles_done, 1u) == call.plan.tiles - 1;
      __threadfence();
      if (all) *call.workspace.tiles_done = 0, *call.workspace.h_there = 0;
    }
    finish_tile<T, kXTiles>(call, tile, shared);
  }
  __syncthreads();  // the flag and h may be written again
}

}  // namespace
