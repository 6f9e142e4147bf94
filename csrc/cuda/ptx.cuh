// The instructions that CUDA C++ has no name for, one function each. PTX ISA: "Matrix Fragments for mma.m16n8k16",
// "cp.async", "ld". Where the kernels are compiled as C++, pe_cpu:: emulates them.
#pragma once

#include "launch.h"

namespace {

// d = a b + c for a (16, 16), b (16, 8), c and d (16, 8) spread over a warp. In lane (g = lane / 4, q = lane % 4), as
// pairs of columns (of b: of rows): a[0] = (row g, columns 2q, 2q+1), a[1] = (row g + 8, the same), a[2] and a[3] the
// same rows, columns 2q+8, 2q+9; b[0] = (rows 2q, 2q+1, column g), b[1] = (rows 2q+8, 2q+9, column g);
// d[0], d[1] = (row g, columns 2q, 2q+1), d[2], d[3] = (row g + 8, the same).
__device__ __forceinline__ void mma(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    const float (&c)[4]) {
#ifdef PE_ON_CPU
  pe_cpu::mma_m16n8k16_bf16(d, a, b, c);
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  __trap();  // sm_75 has no bfloat16; the launcher refuses it
#endif
}

__device__ __forceinline__ void mma(__half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    const float (&c)[4]) {
#if defined(PE_ON_CPU) && __CUDA_ARCH__ >= 800
  pe_cpu::mma_m16n8k16_f16(d, a, b, c);
#elif defined(PE_ON_CPU)
  float half_way[4];
  pe_cpu::mma_m16n8k8_f16(half_way, a, b, c);
  pe_cpu::mma_m16n8k8_f16(d, a + 2, b + 1, half_way);
#elif __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  float half_way[4];  // sm_75: two of half the depth
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
               : "=f"(half_way[0]), "=f"(half_way[1]), "=f"(half_way[2]), "=f"(half_way[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[2]), "r"(a[3]), "r"(b[1]), "f"(half_way[0]), "f"(half_way[1]), "f"(half_way[2]),
                 "f"(half_way[3]));
#endif
}

// Four bytes out of the eight of a and b, by the low four nibbles of `by`, 0 to 7 each. __byte_perm, but for the AND
// that it puts before a `by` whose bits 3 it does not know to be 0.
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t by) {
#ifdef PE_ON_CPU
  return pe_cpu::prmt(a, b, by);
#else
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(by));
  return result;
#endif
}

// The lane, from its own register: threadIdx.x % 32 would be an AND, which ptxas repeats at every use of the result.
__device__ __forceinline__ uint32_t lane_id() {
#ifdef PE_ON_CPU
  return threadIdx.x % 32;
#else
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
#endif
}

// The same value, as if new: what is computed from it is not computed ahead of a loop and held in registers.
__device__ __forceinline__ unsigned fresh(unsigned value) {
  asm volatile("" : "+r"(value));
  return value;
}

// 16 bytes from global to shared memory without a register between; the last 16 - bytes of them become 0.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
#ifdef PE_ON_CPU
  pe_cpu::cp_async_16(shared, global, bytes);
#elif __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
  *static_cast<uint4*>(shared) = bytes == 16 ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef PE_ON_CPU
  pe_cpu::cp_async_commit();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most kPending of this thread's groups are on their way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef PE_ON_CPU
  pe_cpu::cp_async_wait<kPending>();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// 8 bytes that are read once: past L1, and with the rest of their 128 bytes brought to L2. Unless `wanted`, nothing
// happens, without a branch that the code around it could not be moved across. Volatile keeps the loads where they were
// written, ahead of the work that hides their latency.
__device__ __forceinline__ void load_stream_8(uint2& value, const void* global, bool wanted) {
#ifdef PE_ON_CPU
  if (wanted) value = *static_cast<const uint2*>(global);
#else
  asm volatile(
      "{\n .reg .pred wanted;\n setp.ne.u32 wanted, %3, 0;\n"
      " @wanted ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1}, [%2];\n}"
      : "+r"(value.x), "+r"(value.y)
      : "l"(global), "r"(static_cast<uint32_t>(wanted)));
#endif
}

// The same for 16 bytes.
__device__ __forceinline__ void load_stream_16(uint4& value, const void* global, bool wanted) {
#ifdef PE_ON_CPU
  if (wanted) value = *static_cast<const uint4*>(global);
#else
  asm volatile(
      "{\n .reg .pred wanted;\n setp.ne.u32 wanted, %5, 0;\n"
      " @wanted ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
      : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
      : "l"(global), "r"(static_cast<uint32_t>(wanted)));
#endif
}

// 16 bytes that are read again and do not change: through L1. Otherwise as above.
__device__ __forceinline__ void load_16(uint4& value, const void* global, bool wanted) {
#ifdef PE_ON_CPU
  if (wanted) value = *static_cast<const uint4*>(global);
#else
  asm volatile(
      "{\n .reg .pred wanted;\n setp.ne.u32 wanted, %5, 0;\n"
      " @wanted ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
      : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
      : "l"(global), "r"(static_cast<uint32_t>(wanted)));
#endif
}

// Asks for the 128 bytes around an address to be brought to L2.
__device__ __forceinline__ void prefetch(const void* global) {
#ifndef PE_ON_CPU
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#endif
}

}  // namespace
