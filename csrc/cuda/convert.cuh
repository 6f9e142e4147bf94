// The numbers that kernels read and write, to and from float32.
#pragma once

#include "launch.h"

namespace {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void round_to(float* to, float value) { *to = value; }
__device__ __forceinline__ void round_to(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void round_to(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }

}  // namespace
