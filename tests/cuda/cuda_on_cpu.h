// CUDA C++ on the CPU: included before an unmodified .cu file (g++ -include), so that its kernels run under
// AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, and on a machine without a GPU at all.
//
// What holds: each thread is a fibre (fibres.h), ordered with others by barriers, and by fences and atomics together,
// and by nothing else. Shared memory starts as 0xff bytes (NaN). A cp.async changes its target when it is issued (to
// 0xff) and again when it is waited for. What a device would hang on or leave undefined in a warp collective is an
// error. What does not: registers, banks, caches, speed.
#pragma once

#define PE_ON_CPU 1

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda_numbers_on_cpu.h"
#include "device_on_cpu.h"
#include "launch_on_cpu.h"
#include "mma_on_cpu.h"

#define __CUDA_ARCH__ PE_CPU_ARCH

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// Static shared arrays lie together, so that they can be filled and swapped (shared_on_cpu.ld). A section for each:
// those of templates and of plain functions do not mix in one.
#define PE_TEXT_OF(x) #x
#define PE_TEXT(x) PE_TEXT_OF(x)
#define __shared__ static __attribute__((section("pe_shared_" PE_TEXT(__COUNTER__))))
#define PE_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(pe_cpu::dynamic_shared())

#define PE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                            \
  pe_cpu::launch(#kernel, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, (void*)(stream), \
                 [&] { kernel(__VA_ARGS__); })

#define threadIdx (pe_cpu::self->thread_index)
#define blockIdx (pe_cpu::self->block_index)
#define blockDim (pe_cpu::self->block_size)
#define gridDim (pe_cpu::self->grid_size)
#define warpSize 32

inline void __syncthreads() { pe_cpu::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { pe_cpu::warp_barrier(mask); }
[[noreturn]] inline void __trap() { pe_cpu::fail("__trap"); }
inline void __threadfence() { pe_cpu::fence(); }
inline void __threadfence_system() { pe_cpu::fence(); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

namespace pe_cpu {

// `source(i)`: the lane that lane i reads from, in its segment of `width`; out of it, a lane reads itself.
template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t mine = 0, all[32];
  std::memcpy(&mine, &value, sizeof value);
  exchange(Collective::shuffle, mask, &mine, 1, all);
  if (!(mask >> source & 1)) fail("a shuffle reads lane %d, which is not in the mask %08x", source, mask);
  std::memcpy(&value, &all[source], sizeof value);
  return value;
}

inline int lane() { return self->rank % 32; }

inline unsigned vote(unsigned mask, bool mine) {
  uint64_t word = mine, all[32];
  exchange(Collective::vote, mask, &word, 1, all);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) votes |= static_cast<unsigned>(all[i]) << i;
  }
  return votes;
}

// The word is read and written here as well, for AddressSanitizer, which does not look into the rest.
template <class T>
T atomic(Update kind, T* address, T value, T expected = T{}) {
  static_assert(sizeof(T) == 4);
#ifndef PE_TSAN
  *const_cast<volatile T*>(address) = *const_cast<volatile T*>(address);
#endif
  return std::bit_cast<T>(update(kind, reinterpret_cast<uint32_t*>(address), std::bit_cast<uint32_t>(value),
                                 std::bit_cast<uint32_t>(expected)));
}

// cp.async.cg.shared.global 16: `bytes` of 16 are read, the others become zero.
inline void cp_async_16(void* shared, const void* global, int bytes = 16) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    fail("cp.async from %p to %p: both must be aligned to 16 bytes", global, shared);
  }
  if (bytes < 0 || bytes > 16) fail("cp.async of %d bytes", bytes);
  if (!in_shared(shared)) fail("cp.async to %p, which is not shared memory", shared);
  *static_cast<uint4*>(shared) = {~0u, ~0u, ~0u, ~0u};
  self->copies.push_back({shared, global, bytes, self->group});
}
inline void cp_async_commit() { ++self->group; }

// Copies done, but for those of the newest N groups.
template <int N>
void cp_async_wait() {
  size_t kept = 0;
  for (const Copy& copy : self->copies) {
    if (copy.group >= self->group - N) {
      self->copies[kept++] = copy;
      continue;
    }
    unsigned char values[16] = {};
    for (int i = 0; i < copy.bytes; ++i) values[i] = static_cast<const unsigned char*>(copy.global)[i];
    *static_cast<uint4*>(copy.shared) = std::bit_cast<uint4>(values);
  }
  self->copies.resize(kept);
}
// cp.async.wait_all: also what no group was made of.
inline void cp_async_wait_all() {
  cp_async_commit();
  cp_async_wait<0>();
}

}  // namespace pe_cpu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return pe_cpu::shuffle(mask, value, (pe_cpu::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int me = pe_cpu::lane(), source = me ^ bits;
  return pe_cpu::shuffle(mask, value, source / width <= me / width ? source : me);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int me = pe_cpu::lane(), source = me + static_cast<int>(by);
  return pe_cpu::shuffle(mask, value, source / width == me / width ? source : me);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int me = pe_cpu::lane(), source = me - static_cast<int>(by);
  return pe_cpu::shuffle(mask, value, source >= (me & ~(width - 1)) ? source : me);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return pe_cpu::vote(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return pe_cpu::vote(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return pe_cpu::vote(mask, predicate != 0) == mask; }

inline int atomicAdd(int* p, int x) { return pe_cpu::atomic(pe_cpu::Update::add, p, x); }
inline unsigned atomicAdd(unsigned* p, unsigned x) { return pe_cpu::atomic(pe_cpu::Update::add, p, x); }
inline float atomicAdd(float* p, float x) { return pe_cpu::atomic(pe_cpu::Update::add_float, p, x); }
inline int atomicExch(int* p, int x) { return pe_cpu::atomic(pe_cpu::Update::exchange, p, x); }
inline unsigned atomicExch(unsigned* p, unsigned x) { return pe_cpu::atomic(pe_cpu::Update::exchange, p, x); }
inline unsigned atomicMin(unsigned* p, unsigned x) { return pe_cpu::atomic(pe_cpu::Update::minimum, p, x); }
inline unsigned atomicMax(unsigned* p, unsigned x) { return pe_cpu::atomic(pe_cpu::Update::maximum, p, x); }
inline unsigned atomicAnd(unsigned* p, unsigned x) { return pe_cpu::atomic(pe_cpu::Update::bit_and, p, x); }
inline unsigned atomicOr(unsigned* p, unsigned x) { return pe_cpu::atomic(pe_cpu::Update::bit_or, p, x); }
inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned x) {
  return pe_cpu::atomic(pe_cpu::Update::compare_exchange, p, x, expected);
}
