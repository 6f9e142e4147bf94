// How the thread blocks of one launch report to each other: numbers in the order of starting, arrivals at a counter, and
// waiting for one. Counters are 0 between launches.
#pragma once

#include "launch.h"

namespace {

// Draws a number for this thread block, in the order of asking, which CUDA does not promise to be that of blockIdx: who
// waits only for what lower numbers do waits for blocks that run. `meanwhile` passes the time that the answer takes.
// Whoever draws the last of `draws` numbers puts the counter back to 0 for the next launch.
template <typename Work>
__device__ __forceinline__ unsigned number_by_start(unsigned* counter, unsigned draws, unsigned* flag, Work meanwhile) {
  unsigned number = 0;
  if (threadIdx.x == 0) number = atomicAdd(counter, 1u);
  meanwhile();
  if (threadIdx.x == 0) {
    *flag = number;
    if (number == draws - 1) *counter = 0;
  }
  __syncthreads();
  // From one lane, so that the compiler knows what follows from it to be the same in all.
  return __shfl_sync(0xffffffffu, *flag, 0);
}

// Of one thread, past a barrier: what its block wrote is there for whoever sees the counter raised.
__device__ __forceinline__ void arrive(unsigned* counter) {
  __threadfence();
  atomicAdd(counter, 1u);
}

// The same; whether it was the last of `total`, which may read what the others wrote. The last puts the counter back to
// 0 for the next launch.
__device__ __forceinline__ bool arrive_last(unsigned* counter, unsigned total) {
  __threadfence();
  const unsigned before = atomicAdd(counter, 1u);
  __threadfence();
  const bool last = before == total - 1;
  if (last) *counter = 0;
  return last;
}

// The same for a whole thread block.
__device__ inline bool last_to_arrive(unsigned* counter, unsigned total, unsigned* flag) {
  __syncthreads();
  if (threadIdx.x == 0) *flag = arrive_last(counter, total);
  __syncthreads();
  return *flag != 0;
}

// Until *counter, which other thread blocks raise, is `least`: what they wrote before, past a fence, may then be read.
__device__ inline void wait_for(unsigned* counter, unsigned least) {
#ifdef PE_ON_CPU
  while (atomicAdd(counter, 0u) < least) pe_cpu::spin();
#else
  while (*static_cast<volatile unsigned*>(counter) < least) {
#if __CUDA_ARCH__ >= 700
    __nanosleep(32);
#endif
  }
#endif
  __threadfence();
}

}  // namespace
