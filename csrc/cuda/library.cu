// What the library tells of itself and of CUDA: its C ABI (peft_engine/native.py refuses another), an error's text, and
// whether a stream is being captured into a graph.

#include "launch.h"

PE_API int pe_cuda_abi() { return 2; }

PE_API const char* pe_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// The id of the capture that the stream takes part in, 0 for none: what a graph uses must be that graph's own.
PE_API unsigned long long pe_cuda_capture(void* stream, int device) {
  const pe::DeviceGuard guard(device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  if (guard.error != cudaSuccess) return 0;
  if (pe::checked(cudaStreamGetCaptureInfo((cudaStream_t)stream, &status, &id)) != cudaSuccess) return 0;
  return status == cudaStreamCaptureStatusActive ? id : 0;
}
