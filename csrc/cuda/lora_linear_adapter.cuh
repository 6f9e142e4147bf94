// h = x A^T in float32, by a few thread blocks while the others multiply. Each takes a piece of k; the last to be ready
// adds the pieces up in order.
#pragma once

#include "lora_linear_finish.cuh"

namespace {

constexpr int kStaged = 48 * 1024;  // bytes of x and A at a time

// Columns first .. last of the product. Threads divide the ranks by ranks_apart (each has 4), the rows by 8 (each has
// kXTiles) and, as far as they go, the columns, 4 next to each other at a time.
template <typename T, int kXTiles>
__device__ void adapter_piece(const Call& call, int64_t first, int64_t last, float* piece, float* shared) {
  const int rank = call.rank;
  int ranks_apart = 1;
  while (4 * ranks_apart < rank) ranks_apart *= 2;
  const int column_groups = 32 / ranks_apart;
  const int rank_group = threadIdx.x % ranks_apart, row_group = threadIdx.x / ranks_apart % 8,
            column_group = threadIdx.x / (8 * ranks_apart);
  const int padded_rank = 4 * ranks_apart, padded_rows = 8 * kXTiles;
  // 4 more in a row: rows then start at different banks.
  const int columns = (kStaged / 4 / (padded_rank + padded_rows) - 4) / 32 * 32, stride = columns + 4;
  float* staged_a = shared;
  float* staged_x = shared + padded_rank * stride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  float sum[kXTiles][4] = {};
  for (int64_t start = first; start < last; start += columns) {
    const int here = static_cast<int>(last - start < columns ? last - start : columns);
    for (int r = warp; r < padded_rank; r += kWarps) {
#pragma unroll 4
      for (int c = lane; c < here; c += 32) {
        staged_a[r * stride + c] = r < rank ? load_adapter<T>(call, call.lora_a, r * call.k + start + c) : 0.0f;
      }
    }
    for (int m = warp; m < padded_rows; m += kWarps) {
      const T* x = static_cast<const T*>(call.x) + m * call.x_stride + start;
#pragma unroll 4
      for (int c = lane; c < here; c += 32) staged_x[m * stride + c] = m < call.rows ? widen(x[c]) : 0.0f;
    }
    __syncthreads();
    for (int c = 4 * column_group; c < here; c += 4 * column_groups) {
      float4 a[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[r] = *reinterpret_cast<const float4*>(staged_a + (rank_group + r * ranks_apart) * stride + c);
      }
#pragma unroll
      for (int m = 0; m < kXTiles; ++m) {
        const float4 x = *reinterpret_cast<const float4*>(staged_x + (row_group + m * 8) * stride + c);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          sum[m][r] = fmaf(x.x, a[r].x, fmaf(x.y, a[r].y, fmaf(x.z, a[r].z, fmaf(x.w, a[r].w, sum[m][r]))));
        }
      }
    }
    __syncthreads();
  }

  // The sums of the column groups, one after the other in the staging memory.
  const int size = padded_rows * padded_rank;
#pragma unroll
  for (int m = 0; m < kXTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      shared[column_group * size + (row_group + m * 8) * padded_rank + rank_group + r * ranks_apart] = sum[m][r];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < call.rows * rank; i += kThreads) {
    const int at = i / rank * padded_rank + i % rank;
    float total = 0.0f;
    for (int group = 0; group < column_groups; ++group) total += shared[group * size + at];
    piece[i] = total;
  }
}

template <typename T, int kXTiles>
__device__ void adapter_block(const Call& call, unsigned number, unsigned char* shared) {
  const unsigned pieces = call.plan.pieces, units = call.plan.units, size = call.rows * call.rank;
  const int64_t first = static_cast<int64_t>(number) * units / pieces * kUnit;
  const int64_t last = (static_cast<int64_t>(number) + 1) * units / pieces * kUnit;
  adapter_piece<T, kXTiles>(call, first, last, call.workspace.pieces + static_cast<int64_t>(number) * size,
                            reinterpret_cast<float*>(shared));
  unsigned* flag = reinterpret_cast<unsigned*>(shared + Memory<kXTiles>::kFlagsAt);
  if (!last_to_arrive(call.workspace.pieces_done, pieces, flag)) return;
  for (unsigned i = threadIdx.x; i < size; i += kThreads) {
    float total = 0.0f;
#pragma unroll 8
    for (unsigned piece = 0; piece < pieces; ++piece) total += call.workspace.pieces[piece * size + i];
    call.workspace.h[i] = total;
    if (call.h != nullptr) call.h[i] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive(call.workspace.h_there);
  }
}

}  // namespace
