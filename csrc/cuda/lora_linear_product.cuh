// The base product: NF4 bytes to the operands of mma by one table lookup for two weights, the block's scale applied to
// the sums of 64 columns. Layouts: A of mma is 16 rows of W, B is 8 rows of x; the order of the columns within a unit
// is free as long as both have the same. Lane (g = lane / 4, q = lane % 4) takes 8 packed bytes of row g, a fourth of
// the unit's 32, so that four lanes read one sector; mma j (0..3) has weights 4j .. 4j+3 of these 16.
#pragma once

#include "lora_linear_finish.cuh"
#include "ptx.cuh"

namespace {

// The 16 codes are stored as 16-bit floats multiplied by kCodeFactor, and scales are divided by it: the factors were
// searched (65,536 of them, from 1 to 2) for the least rms rounding error of the codes. bfloat16: 3.2e-4 where factor 1
// has 5.5e-4 and a dense bfloat16 weight 8.5e-4. float16: 3.2e-5.
template <typename T>
constexpr float kCodeFactor = 1.0f;
template <>
constexpr float kCodeFactor<__nv_bfloat16> = 1.43701171875f;
template <>
constexpr float kCodeFactor<__half> = 1.6776885986328125f;

// Entry b: the codes of a packed byte, the high nibble's (the first weight) in the low half. Each of the 32 lanes has
// its own copy, in its own bank: no lookup waits for another.
template <typename T, int kEntry>
__device__ __forceinline__ void fill_decode_table(unsigned char* shared) {
  const int byte = threadIdx.x % 256;  // with more threads, some write the same again
  T first, second;
  round_to(&first, __ldg(nf4_code.value + (byte >> 4)) * kCodeFactor<T>);
  round_to(&second, __ldg(nf4_code.value + (byte & 15)) * kCodeFactor<T>);
  const uint32_t pair = bits_of(first) | bits_of(second) << 16;
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // neighbouring threads write different banks
    *reinterpret_cast<uint4*>(shared + byte * kEntry + (i + byte) % 8 * 16) = make_uint4(pair, pair, pair, pair);
  }
}

// The two weights of byte `kByte` of `word`; lane4 is 4 times the lane.
template <int kByte, int kEntry>
__device__ __forceinline__ uint32_t decode(const unsigned char* shared, uint32_t word, uint32_t lane4) {
  uint32_t at;
  if (kEntry == 256) {
    at = __byte_perm(word, lane4, 0x5504 | kByte << 4);
  } else {
    at = ((kByte == 0 ? word << 7 : word >> (8 * kByte - 7)) & 0x7f80u) | lane4;
  }
  return *reinterpret_cast<const uint32_t*>(shared + at);
}

// A thread of a block that multiplies. Its packed bytes come kAhead units ahead, to registers; x and the scales a window
// of units ahead, to shared memory.
template <typename T, int kXTiles>
struct Product {
  using Mine = Memory<kXTiles>;
  static constexpr int kBuffers = Mine::kBuffers, kWindow = Mine::kWindow, kEntry = Mine::kEntry;
  static constexpr int kAhead = 2;
  static_assert(kTileRows == kThreads);  // each thread brings kWindow scales

  const Call& call;
  unsigned char* const shared;
  const uint32_t lane = lane_id();
  const uint8_t* packed[kWeightTiles][2];
  uint2 ahead[kAhead][kWeightTiles][2];
  float sum[kWeightTiles][kXTiles][4];
  uint32_t raw_absmax[kWindow];
  float raw_nested[kWindow];

  __device__ __forceinline__ Product(const Call& c, unsigned char* s) : call(c), shared(s) {}

  // The first row of W of the warp's 16-row tile t.
  __device__ __forceinline__ int row_of(int t) const { return (threadIdx.x / 32 * kWeightTiles + t) * 16; }

  // The first packed bytes of a segment. Rows past the last are read as the last, and not stored.
  __device__ __forceinline__ void load_first(unsigned tile, unsigned unit, int count) {
    const unsigned first = tile * kTileRows + fresh(row_of(0) + lane / 4), last = static_cast<unsigned>(call.n - 1);
    const uint8_t* quarter = call.packed + unit * int64_t{kUnit / 2} + lane % 4 * 8;
#pragma unroll
    for (int t = 0; t < kWeightTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        packed[t][half] = quarter + min(first + t * 16 + half * 8, last) * (call.k / 2);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(i, i, i < count);
  }

  // The beginning of the warp's 32 rows, to L2 while the tile before is delivered: registers are not held for it.
  __device__ __forceinline__ void prefetch_first(unsigned tile) {
    const unsigned row = min(tile * kTileRows + row_of(0) + lane, static_cast<unsigned>(call.n - 1));
    prefetch(call.packed + row * (call.k / 2));
  }

  __device__ __forceinline__ void load(int slot, int unit, bool wanted) {
#pragma unroll
    for (int t = 0; t < kWeightTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        load_stream_8(ahead[slot][t][half], packed[t][half] + unit * (kUnit / 2), wanted);
      }
    }
  }

  // x of `count` units, in the order in which lanes read it: the first 8 of a lane's 16 columns, 16 bytes for each lane,
  // then the other 8. A thread brings the same 8 columns of a unit each time.
  __device__ __forceinline__ void load_x(int buffer, unsigned unit, int count) {
    constexpr int kXRows = 8 * kXTiles, kAtOnce = kThreads / 8;  // rows of units that the threads bring at once
    const unsigned thread = fresh(threadIdx.x), piece = thread % 8, first = thread / 8;
    const T* x = static_cast<const T*>(call.x) + unit * int64_t{kUnit} + piece * 8;
#pragma unroll
    for (int i = 0; i < (kWindow * kXRows + kAtOnce - 1) / kAtOnce; ++i) {
      const int row = (first + i * kAtOnce) % kXRows;
      const int at_unit = (first + i * kAtOnce) / kXRows;
      if (at_unit >= count) break;
      const bool inside = row < call.rows;
      const T* from = x + (inside ? row : 0) * call.x_stride + at_unit * kUnit;
      unsigned char* to = shared + Mine::x((buffer * kWindow + at_unit) * kXTiles + row / 8,
                                           piece % 2 * 512 + (row % 8 * 4 + piece / 2) * 16);
      if (call.aligned) {
        cp_async_16(to, from, inside ? 16 : 0);
      } else {
#pragma unroll 1
        for (int j = 0; j < 8; ++j) round_to(reinterpret_cast<T*>(to) + j, inside ? widen(from[j]) : 0.0f);
      }
    }
    cp_async_commit();
  }

  // Scales of the tile's rows as they are stored, to registers: their latency passes while the window before is
  // multiplied. Past the end of W, or of the segment, any will do.
  __device__ __forceinline__ void load_scales(unsigned tile, unsigned unit) {
    const unsigned units = call.plan.units, thread = fresh(threadIdx.x);
    const unsigned first = (tile * kTileRows + thread / kWindow) * units + unit + thread % kWindow;
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      const unsigned block = min(first + i * (kThreads / kWindow) * units, call.blocks - 1) >> (call.scales.shift - 6);
      if (!call.scales.nested()) {
        raw_absmax[i] = __float_as_uint(__ldg(static_cast<const float*>(call.scales.absmax) + block));
      } else {
        raw_absmax[i] = __ldg(static_cast<const uint8_t*>(call.scales.absmax) + block);
        raw_nested[i] = __ldg(call.scales.nested_absmax + (block >> 8));
      }
    }
  }

  __device__ __forceinline__ float* scales(int buffer) const {
    return reinterpret_cast<float*>(shared + Mine::kScalesAt + buffer * Mine::kScales);
  }

  __device__ __forceinline__ void store_scales(int buffer) {
    const int thread = fresh(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      const int id = thread + i * kThreads;
      float scale = __uint_as_float(raw_absmax[i]);
      if (call.scales.nested()) scale = call.scales.undo(raw_absmax[i], raw_nested[i]);
      scales(buffer)[id] = scale * (1.0f / kCodeFactor<T>);
    }
  }

  // The products of the unit in `slot`, times its scales, added to the sums. x_at: where this lane reads the unit's x.
  __device__ __forceinline__ void multiply(int slot, const unsigned char* x_at,
                                           const float (&scale)[kWeightTiles][2][kAhead]) {
    const uint32_t lane4 = lane * 4;
    uint32_t a[kWeightTiles][4][4];
#pragma unroll
    for (int t = 0; t < kWeightTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 word = ahead[slot][t][half];
        a[t][0][half] = decode<0, kEntry>(shared, word.x, lane4);
        a[t][0][half + 2] = decode<1, kEntry>(shared, word.x, lane4);
        a[t][1][half] = decode<2, kEntry>(shared, word.x, lane4);
        a[t][1][half + 2] = decode<3, kEntry>(shared, word.x, lane4);
        a[t][2][half] = decode<0, kEntry>(shared, word.y, lane4);
        a[t][2][half + 2] = decode<1, kEntry>(shared, word.y, lane4);
        a[t][3][half] = decode<2, kEntry>(shared, word.y, lane4);
        a[t][3][half + 2] = decode<3, kEntry>(shared, word.y, lane4);
      }
    }
#pragma unroll
    for (int m = 0; m < kXTiles; ++m) {
      const uint4 low = *reinterpret_cast<const uint4*>(x_at + Mine::x(m, 0) - Mine::x(0, 0));
      const uint4 high = *reinterpret_cast<const uint4*>(x_at + Mine::x(m, 512) - Mine::x(0, 0));
      const uint32_t b[4][2] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
#pragma unroll
      for (int t = 0; t < kWeightTiles; ++t) {
        float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(T(), product, a[t][j], b[j], product);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[t][m][i] = fmaf(product[i], scale[t][i / 2][slot], sum[t][m][i]);
      }
    }
  }

  // Where this lane reads the x of the first unit of a buffer: 16 of 512 bytes, in lines of 128 that are kEntry apart.
  __device__ __forceinline__ const unsigned char* x_of(int buffer) const {
    const int line = kEntry == 256 ? lane / 8 * 256 + lane % 8 * 16 : lane * 16;
    return shared + Mine::x(buffer * kWindow * kXTiles, 0) + line;
  }

  // kAhead units from `unit` of the window on, or (not kWhole) `here` of them. They begin the `left` that the segment
  // still has. Whole groups have no branches, so that the units' instructions mix.
  template <bool kWhole>
  __device__ __forceinline__ void group(int buffer, int unit, int here, int left) {
    constexpr int kUnitOfX = Mine::x(kXTiles, 0) - Mine::x(0, 0);  // bytes from one unit to the next
    const unsigned char* x_at = x_of(buffer) + unit * kUnitOfX;
    float scale[kWeightTiles][2][kAhead];
#pragma unroll
    for (int t = 0; t < kWeightTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* from = scales(buffer) + (row_of(t) + half * 8 + static_cast<int>(lane / 4)) * kWindow + unit;
        static_assert(kAhead == 2);
        const float2 pair = *reinterpret_cast<const float2*>(from);
        scale[t][half][0] = pair.x, scale[t][half][1] = pair.y;
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (kWhole || i < here) multiply(i, x_at + i * kUnitOfX, scale);
      load(i, i + kAhead, i + kAhead < left);
    }
#pragma unroll
    for (int t = 0; t < kWeightTiles; ++t) packed[t][0] += kAhead * kUnit / 2, packed[t][1] += kAhead * kUnit / 2;
  }

  // The `here` units of a window, which begin the `left` that the segment still has.
  __device__ __forceinline__ void window(int buffer, int here, int left) {
    if constexpr (kXTiles == 8) {  // one group, in which a unit is enough to mix
      group<false>(buffer, 0, here, left);
    } else {
      int unit = 0;
      for (; unit + kAhead <= here; unit += kAhead) group<true>(buffer, unit, kAhead, left - unit);
      if (unit < here) group<false>(buffer, unit, here - unit, left - unit);
    }
  }

  // The part of a tile from `unit` on that this worker has. The first packed bytes are on their way already.
  __device__ __forceinline__ void segment(unsigned tile, unsigned unit, int count) {
#pragma unroll
    for (int t = 0; t < kWeightTiles; ++t) {
#pragma unroll
      for (int m = 0; m < kXTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[t][m][i] = 0.0f;
      }
    }
    int buffer = 0;
    for (int left = count; left > 0; left -= kWindow, unit += kWindow) {
      if (kBuffers == 1) {
        __syncthreads();  // the window before is no longer read
        load_x(0, unit, min(left, kWindow));
      }
      store_scales(buffer);
      cp_async_wait<0>();
      __syncthreads();  // x and the scales are there, and the window before is no longer read
      if (left > kWindow) {
        if (kBuffers == 2) load_x(1 - buffer, unit + kWindow, min(left - kWindow, kWindow));
        load_scales(tile, unit + kWindow);
      }
      window(buffer, min(left, kWindow), left);
      if (kBuffers == 2) buffer = 1 - buffer;
    }
  }

  __device__ __forceinline__ void store_segment(unsigned number) {
    const int x_row = lane % 4 * 2, inside = call.rows - x_row;
    float* to = call.workspace.segments + static_cast<int64_t>(number) * (8 * kXTiles) * kTileRows +
                static_cast<int>(x_row * kTileRows + row_of(0) + lane / 4);
#pragma unroll
    for (int t = 0; t < kWeightTiles; ++t) {
#pragma unroll
      for (int m = 0; m < kXTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (m * 8 + i % 2 < inside) to[(m * 8 + i % 2) * kTileRows + t * 16 + i / 2 * 8] = sum[t][m][i];
        }
      }
    }
  }

  // The decode table is being filled: the first segment has a barrier before it reads it.
  __device__ __forceinline__ void run(unsigned worker) {
    const int units = call.plan.units;
    const unsigned first = call.plan.start(worker);
    int rest = call.plan.start(worker + 1) - first;
    unsigned tile = first / units, unit = first % units;
    int count = min(units - static_cast<int>(unit), rest);
    load_first(tile, unit, count);
    load_scales(tile, unit);
    if (kBuffers == 2) load_x(0, unit, min(count, kWindow));
    while (true) {
      segment(tile, unit, count);
      store_segment(worker + tile);
      rest -= count;
      count = min(units, rest);
      if (count > 0) prefetch_first(tile + 1);
      deliver_segment<T, kXTiles>(call, tile, shared);
      if (count == 0) break;
      ++tile, unit = 0;
      load_first(tile, 0, count);
      load_scales(tile, 0);
      if (kBuffers == 2) load_x(0, 0, min(count, kWindow));
    }
  }
};

}  // namespace
