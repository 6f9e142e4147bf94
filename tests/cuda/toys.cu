// Small kernels that test the emulation itself: each uses one means by which CUDA threads work together.

#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 128;

// The sum of x: each block of its part, and who comes last of the parts, in their order.
__global__ void sum(const float* x, float* partial, unsigned* counter, float* out, int64_t n) {
  __shared__ float values[kThreads];
  __shared__ bool last;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread;
  values[thread] = i < n ? x[i] : 0.0f;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) values[thread] += values[thread + half];
    __syncthreads();
  }
  if (thread == kThreads - 1) partial[blockIdx.x] = values[0];
  __syncthreads();  // before the fence
  if (thread == 0) {
    __threadfence();  // release
    const unsigned before = atomicAdd(counter, 1u);
    __threadfence();  // acquire
    last = before == gridDim.x - 1;
  }
  __syncthreads();
  if (last && thread == 1) {
    float total = 0.0f;
    for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
    *out = total;
    *counter = 0;
  }
}

// By tiles of 16 x 16 through shared memory.
__global__ void transpose(const float* x, float* out, int rows, int columns) {
  __shared__ float tile[16][17];
  const int i = static_cast<int>(threadIdx.y), j = static_cast<int>(threadIdx.x);
  const int row = static_cast<int>(blockIdx.y) * 16, column = static_cast<int>(blockIdx.x) * 16;
  if (row + i < rows && column + j < columns) tile[i][j] = x[(row + i) * columns + column + j];
  __syncthreads();
  if (column + i < columns && row + j < rows) out[(column + i) * rows + row + j] = tile[j][i];
}

// One warp: shuffles, votes, and a word passed on in shared memory.
__global__ void warp(const float* x, float* out, unsigned* votes) {
  __shared__ float passed[32];
  const int lane = static_cast<int>(threadIdx.x);
  const unsigned all = 0xffffffffu;
  float value = x[lane];
  for (int bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(all, value, bit);
  out[lane] = value;
  out[32 + lane] = __shfl_up_sync(all, x[lane], 1);
  out[64 + lane] = __shfl_down_sync(all, x[lane], 3, 8);
  out[96 + lane] = __shfl_sync(all, x[lane], 5, 16);
  passed[lane] = x[lane];
  __syncwarp();
  out[128 + lane] = passed[31 - lane];
  votes[lane] = __ballot_sync(all, x[lane] > 0.0f);
  votes[32 + lane] = static_cast<unsigned>(__any_sync(all, x[lane] > 0.0f) * 2 + __all_sync(all, x[lane] > 0.0f));
  if (lane < 16) votes[lane] += __ballot_sync(0x0000ffffu, x[lane] > 0.0f);  // both halves at the same time
  if (lane >= 16) votes[lane] += __ballot_sync(0xffff0000u, x[lane] > 0.0f);
}

// Atomics on shared memory, then on global memory.
__global__ void histogram(const int* x, int* out, int n) {
  __shared__ int counts[16];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 16) counts[thread] = 0;
  __syncthreads();
  const int i = static_cast<int>(blockIdx.x) * kThreads + thread;
  if (i < n) atomicAdd(&counts[x[i]], 1);
  __syncthreads();
  if (thread < 16) atomicAdd(&out[thread], counts[thread]);
}

// Chunks of 4 floats a thread through two stages of dynamic shared memory; each thread adds up its neighbour's.
__global__ void pipeline(const float* x, float* out, int chunks) {
  PE_DYNAMIC_SHARED(float, stages);
  const int thread = static_cast<int>(threadIdx.x), neighbour = (thread + 1) % kThreads;
  float sum = 0.0f;
  auto fetch = [&](int chunk) {
    if (chunk < chunks)
      pe_cpu::cp_async_16(stages + (chunk % 2 * kThreads + thread) * 4, x + (chunk * kThreads + thread) * 4, 16);
    pe_cpu::cp_async_commit();
  };
  fetch(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    fetch(chunk + 1);
    pe_cpu::cp_async_wait<1>();
    __syncthreads();  // everybody's chunk is there
    const float4 values = *reinterpret_cast<const float4*>(stages + (chunk % 2 * kThreads + neighbour) * 4);
    sum += values.x + values.y + values.z + values.w;
    __syncthreads();  // everybody has read it
  }
  out[thread] = sum;
}

__global__ void mma(int kind, const unsigned* a, const unsigned* b, const float* c, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  a += 4 * lane, b += 2 * lane, c += 4 * lane, d += 4 * lane;
  if (kind == 0) pe_cpu::mma_m16n8k16_bf16(d, a, b, c);
  if (kind == 1) pe_cpu::mma_m16n8k16_f16(d, a, b, c);
  if (kind == 2) pe_cpu::mma_m16n8k8_f16(d, a, b, c);
}

template <class T>
__global__ void round_to(const float* x, T* out, float* back, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    out[i] = T(x[i]);
    back[i] = static_cast<float>(out[i]);
  }
}

// Rows that lie far apart, four floats at a time.
__global__ void wide(const float* x, float* out, int64_t row_stride) {
  const int64_t row = blockIdx.x;
  const float4 values = *reinterpret_cast<const float4*>(x + row * row_stride);
  out[row] = values.x + values.y + values.z + values.w;
}

// Sums of x up to each element, by a thread block for each: it waits for the one that started before.
__global__ void relay(const float* x, float* out, unsigned* turn, unsigned* started) {
  if (threadIdx.x != 0) return;
  const unsigned number = atomicAdd(started, 1u);
  while (atomicAdd(turn, 0u) != number) pe_cpu::spin();
  __threadfence();  // what the one before wrote
  out[number] = x[number] + (number > 0 ? out[number - 1] : 0.0f);
  __threadfence();  // for the next
  atomicAdd(turn, 1u);
}

// Threads beyond n leave; the others' barrier does not wait for them.
__global__ void leave(const float* x, float* out, int n) {
  __shared__ float values[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= n) return;
  values[thread] = x[thread];
  __syncthreads();
  out[thread] = values[n - 1 - thread];
}

}  // namespace

extern "C" {

int toy_sum(const float* x, float* partial, unsigned* counter, float* out, int64_t n) {
  PE_LAUNCH(sum, static_cast<unsigned>((n + kThreads - 1) / kThreads), kThreads, 0, nullptr, x, partial, counter, out,
            n);
  return cudaGetLastError();
}

int toy_transpose(const float* x, float* out, int rows, int columns) {
  const dim3 grid(static_cast<unsigned>(columns + 15) / 16, static_cast<unsigned>(rows + 15) / 16);
  PE_LAUNCH(transpose, grid, dim3(16, 16), 0, nullptr, x, out, rows, columns);
  return cudaGetLastError();
}

int toy_warp(const float* x, float* out, unsigned* votes) {
  PE_LAUNCH(warp, 1, 32, 0, nullptr, x, out, votes);
  return cudaGetLastError();
}

int toy_histogram(const int* x, int* out, int n) {
  PE_LAUNCH(histogram, static_cast<unsigned>(n + kThreads - 1) / kThreads, kThreads, 0, nullptr, x, out, n);
  return cudaGetLastError();
}

int toy_pipeline(const float* x, float* out, int chunks) {
  constexpr int kBytes = 2 * kThreads * 16;
  PE_LAUNCH(pipeline, 1, kThreads, kBytes, nullptr, x, out, chunks);
  return cudaGetLastError();
}

int toy_mma(int kind, const unsigned* a, const unsigned* b, const float* c, float* d) {
  PE_LAUNCH(mma, 1, 32, 0, nullptr, kind, a, b, c, d);
  return cudaGetLastError();
}

int toy_round(int dtype, const float* x, void* out, float* back, int64_t n) {
  if (dtype == 1) PE_LAUNCH(round_to<__half>, 1, kThreads, 0, nullptr, x, static_cast<__half*>(out), back, n);
  if (dtype == 2)
    PE_LAUNCH((round_to<__nv_bfloat16>), 1, kThreads, 0, nullptr, x, static_cast<__nv_bfloat16*>(out), back, n);
  return cudaGetLastError();
}

int toy_wide(const float* x, float* out, int64_t row_stride, int rows) {
  PE_LAUNCH(wide, static_cast<unsigned>(rows), 1, 0, nullptr, x, out, row_stride);
  return cudaGetLastError();
}

int toy_relay(const float* x, float* out, unsigned* turn, int n) {
  PE_LAUNCH(relay, static_cast<unsigned>(n), 32, 0, nullptr, x, out, turn, turn + 1);
  return cudaGetLastError();
}

int toy_leave(const float* x, float* out, int n) {
  PE_LAUNCH(leave, 1, kThreads, 0, nullptr, x, out, n);
  return cudaGetLastError();
}
}
