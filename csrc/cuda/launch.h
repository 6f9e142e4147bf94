// What every CUDA file of this library starts with: checked launches, the caller's device restored, types by code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
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

#ifdef PE_ON_CPU
constexpr bool kKeeps = false;  // the tests change the device from call to call
#else
constexpr bool kKeeps = true;
#endif
constexpr int kKeptDevices = 64;  // of which something is kept; the runtime is asked about the others every time

// An attribute of a device, for which the runtime is asked once.
template <cudaDeviceAttr kAttribute>
cudaError_t device_attribute(int* value, int device) {
  static std::atomic<int> kept[kKeptDevices];  // one more than the value; 0: not asked yet
  const bool fits = device >= 0 && device < kKeptDevices;
  const int known = fits ? kept[device].load(std::memory_order_relaxed) : 0;
  if (kKeeps && known != 0) {
    *value = known - 1;
    return cudaSuccess;
  }
  const cudaError_t error = checked(cudaDeviceGetAttribute(value, kAttribute, device));
  if (error == cudaSuccess && fits) kept[device].store(*value + 1, std::memory_order_relaxed);
  return error;
}

// Lets `kernel` have `bytes` of dynamic shared memory, on a device always as many. `allowed`: the devices where it has
// been done, a bit each; two threads at once do it twice.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, int bytes, int device, std::atomic<uint64_t>* allowed) {
  const uint64_t bit = device < kKeptDevices ? uint64_t{1} << device : 0;
  if (allowed->load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error = checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (error == cudaSuccess) allowed->fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// Makes `device` the current one, and the one from before again at the end. That makes a context on the one from before,
// hundreds of MB of a GPU that the process may have no other use for: callers have `device` current already.
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
