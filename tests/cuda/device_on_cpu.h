// The part of CUDA's runtime that launchers use. The device has what an H100 has, unless PE_CPU_ARCH names another.
#pragma once

#include <cstddef>

#include "cuda_numbers_on_cpu.h"

#ifndef PE_CPU_ARCH
#define PE_CPU_ARCH 900
#endif

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};
struct cudaFuncAttributes {
  int binaryVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
using cudaStream_t = void*;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id);
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream);

namespace pe_cpu {

int current_device();
void set_error(cudaError_t error);
const char* refuse_launch(const void* function, dim3 grid, dim3 block, size_t shared_bytes);  // null: it may run
cudaError_t get_attributes(cudaFuncAttributes* found);
cudaError_t set_attribute(const void* function, cudaFuncAttribute attribute, int value);
int blocks_per_multiprocessor(int threads, size_t shared_bytes);

}  // namespace pe_cpu

template <class F>
cudaError_t cudaFuncSetAttribute(F* function, cudaFuncAttribute attribute, int value) {
  return pe_cpu::set_attribute(reinterpret_cast<const void*>(function), attribute, value);
}
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, F*) {
  return pe_cpu::get_attributes(found);
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int threads, size_t shared_bytes) {
  *blocks = pe_cpu::blocks_per_multiprocessor(threads, shared_bytes);
  return cudaSuccess;
}
