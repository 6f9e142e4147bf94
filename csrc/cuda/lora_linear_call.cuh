// What the kernel of lora_linear.cu is called with, and shared memory.
#pragma once

#include "arrivals.cuh"
#include "convert.cuh"
#include "lora_linear_plan.cuh"
#include "scale.cuh"

namespace {

struct Call {
  const void* x;  // (rows, k), x_stride between rows
  int64_t x_stride;
  int rows;
  int64_t k;
  const uint8_t* packed;
  Scales scales;
  int64_t n;
  unsigned blocks;     // of 64 weights that W has
  const void* lora_a;  // (rank, k)
  const void* lora_b;  // (n, rank)
  int rank;
  bool wide_adapter;  // A and B are float32, not x's dtype
  bool aligned;       // rows of x start at multiples of 16 bytes
  float scaling;
  const void* bias;
  void* y;
  float* h;
  Workspace workspace;
  Plan plan;
};

template <typename T>
__device__ __forceinline__ float load_adapter(const Call& call, const void* weight, int64_t i) {
  return call.wide_adapter ? __ldg(static_cast<const float*>(weight) + i) : widen(static_cast<const T*>(weight)[i]);
}

// Shared memory: the table of decode_table; x, in units of 1 KB (64 columns of 8 rows); scales. When a tile is finished,
// the adapter's h lies where scales (sm_75: x) were. An entry of the table takes 128 bytes, 4 for each lane. Where there
// is room, entries are 256 bytes apart: a byte and a lane are then put together to an address by one PRMT. The other 128
// bytes hold x. sm_75 has 64 KB in all, and pays a shift and a mask instead.
template <int kXTiles, bool kWide>
struct Shared {
  static constexpr int kBuffers = kWide ? 2 : 1;
  static constexpr int kWindow = kXTiles == 1 ? 8 : kXTiles <= 4 ? 4 : 2;  // units at a time
  static constexpr int kEntry = kWide ? 256 : 128;
  static constexpr int kTable = 256 * kEntry;
  static constexpr int kXBytes = kWide ? 0 : 16 * 1024;  // beside the table
  static constexpr int kScales = kTileRows * kWindow * 4;
  static constexpr int kScalesAt = kTable + kXBytes;
  static constexpr int kH = 8 * kXTiles * kMaxRank * 4;
  static constexpr int kHAt = kWide ? kScalesAt : kTable;
  static constexpr int kFlagsAt = kScalesAt + (kWide && kH > kBuffers * kScales ? kH : kBuffers * kScales);
  static constexpr int kBytes = kFlagsAt + 64;
  static_assert(kWide || kH <= kXBytes);

  // Byte `offset` of the 1 KB of a unit.
  __host__ __device__ static constexpr int x(int unit, int offset) {
    return kWide ? (unit * 8 + offset / 128) * 256 + 128 + offset % 128 : kTable + unit * 1024 + offset;
  }
};

// Thread blocks that fit a multiprocessor by their shared memory; no more need to by their registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 800 && __CUDA_ARCH__ != 900 && __CUDA_ARCH__ != 1000
constexpr int kFit = 1;
#else
constexpr int kFit = 2;
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <int kXTiles>
using Memory = Shared<kXTiles, false>;
#else
template <int kXTiles>
using Memory = Shared<kXTiles, true>;
#endif

// lora_linear_few.cuh: whether the distances between a lane's rows must be computed anew at each use, since ptxas holds
// them in registers that it then lacks. On sm_120 it does not.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr bool kFewFresh = false;
#else
constexpr bool kFewFresh = true;
#endif

}  // namespace
