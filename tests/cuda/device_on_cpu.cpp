// See device_on_cpu.h. Two devices, so that a launcher that forgets to put the former one back is found.
#include "device_on_cpu.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

#include "launch_on_cpu.h"

namespace pe_cpu {
namespace {

constexpr int kDevices = 2;
constexpr int kSharedPerBlock = PE_CPU_ARCH == 750                          ? 65536
                                : PE_CPU_ARCH == 800                        ? 166912
                                : PE_CPU_ARCH == 900 || PE_CPU_ARCH == 1000 ? 232448
                                                                            : 101376;

int device = 0;
cudaError_t last_error = cudaSuccess;
cudaStream_t captured = nullptr;  // the stream that is being captured into a graph, and the capture
unsigned long long capture = 0;
std::map<const void*, int> dynamic_limit;  // what cudaFuncSetAttribute allowed

}  // namespace

int current_device() { return device; }
void set_error(cudaError_t error) { last_error = error; }

cudaError_t get_attributes(cudaFuncAttributes* found) {
  if (std::getenv("PE_CPU_NO_IMAGE") != nullptr) return last_error = cudaErrorNoKernelImageForDevice;
  *found = {PE_CPU_ARCH / 10};
  return cudaSuccess;
}

cudaError_t set_attribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > kSharedPerBlock) {
    return last_error = cudaErrorInvalidValue;
  }
  dynamic_limit[function] = value;
  return cudaSuccess;
}

const char* refuse_launch(const void* function, dim3 grid, dim3 block, size_t shared_bytes) {
  const auto limit = dynamic_limit.find(function);
  const size_t allowed = limit == dynamic_limit.end() ? 48 << 10 : static_cast<size_t>(limit->second);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "an empty grid";
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return "a grid beyond 2147483647 x 65535 x 65535";
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return "a block of no threads or of more than 1024";
  if (shared_bytes > allowed) return "more dynamic shared memory than cudaFuncSetAttribute allowed";
  return nullptr;
}

int blocks_per_multiprocessor(int threads, size_t shared_bytes) {
  const int by_threads = (PE_CPU_ARCH == 750 ? 1024 : 2048) / threads;
  const int by_shared = static_cast<int>((kSharedPerBlock + 1024) / (shared_bytes + 1024));
  return by_threads < by_shared ? by_threads : by_shared;
}

}  // namespace pe_cpu

cudaError_t cudaGetDevice(int* device) {
  *device = pe_cpu::device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= pe_cpu::kDevices) return pe_cpu::last_error = cudaErrorInvalidDevice;
  pe_cpu::device = device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = pe_cpu::last_error;
  pe_cpu::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return pe_cpu::last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unrecognized error code";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= pe_cpu::kDevices) return pe_cpu::last_error = cudaErrorInvalidDevice;
  const char* multiprocessors = std::getenv("PE_CPU_MULTIPROCESSORS");
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors ? std::atoi(multiprocessors) : pe_cpu::kMultiprocessors;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = PE_CPU_ARCH / 100;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = PE_CPU_ARCH % 100 / 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = pe_cpu::kSharedPerBlock + 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = pe_cpu::kSharedPerBlock;
      break;
    default:
      return pe_cpu::last_error = cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id) {
  const bool active = pe_cpu::capture != 0 && stream == pe_cpu::captured;
  *status = active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (active) *id = pe_cpu::capture;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

// For the tests.
extern "C" {
const char* pe_cpu_message() { return pe_cpu::message(); }
int pe_cpu_device() { return pe_cpu::device; }
void pe_cpu_set_device(int device) { pe_cpu::device = device; }
void pe_cpu_capture(void* stream, unsigned long long id) {
  pe_cpu::captured = stream;
  pe_cpu::capture = id;
}
// Of the last launch: 0-2 the grid, 3 the threads of a block, 4 the stream, 5 the device, 6 dynamic shared bytes.
int64_t pe_cpu_last_launch(int what) {
  const pe_cpu::LaunchInfo& last = pe_cpu::last_launch;
  const int64_t values[] = {last.grid.x,
                            last.grid.y,
                            last.grid.z,
                            int64_t{last.block.x} * last.block.y * last.block.z,
                            reinterpret_cast<int64_t>(last.stream),
                            last.device,
                            static_cast<int64_t>(last.shared_bytes)};
  return values[what];
}
}
