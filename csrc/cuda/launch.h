// What every CUDA file of this library starts with: checked launches, the caller's device restored, types by code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define PE_API extern "C" __attribute__((visibility("default")))

// The kernels also compile as C++ (tests/cuda): there, launches and dynamic shared memory are functions.
#ifndef PE_LAUNCH
#define PE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif
#ifndef PE_DYNAMIC_SHARED
#define PE_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

namespace pe {

enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// The error of a call that is not a launch: returned, and no longer there for the next launch to find.
inline cudaError_t checked(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

// Makes `device` the current one, and the one from before again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = checked(cudaGetDevice(&before_));
    if (error == cudaSuccess && before_ != device) error = checked(cudaSetDevice(device));
    changed_ = error == cudaSuccess && before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error = cudaSuccess;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace pe
