// 1 to 16 rows of x: a thread block has 32 rows of W over all columns, and its warps a part of the columns each, so that
// the sums meet in shared memory and nothing but y is written. The decode is that of lora_linear_product.cuh; x goes from
// memory to the operands of mma, since no two warps of a block read the same of it.
//
// Floor: the packed bytes. A multiprocessor must have 32 KB of them on their way, so every thread asks for 4 units of its
// rows before it uses the first. Next comes the pipe of the loads, which is busy for a cycle with each line of memory
// that a warp's load touches: hence 16 bytes at a time of W, and four scales of a row by one load. x A^T is cut into
// pieces that the first blocks to start compute while their bytes are on the way; who then needs the sum waits for the
// pieces, all of which have started.
//
// Lane (g = lane / 4, q = lane % 4) loads bytes 16q .. 16q+15 of the 64 that a pair of units has in its row g: unit 0 in
// lanes 0 and 1 of a quad, unit 1 in lanes 2 and 3. Each gives the second 8 to lane q ^ 2, and so has 8 of each unit:
// of unit 0 those from {0, 16, 8, 24}[q] on, of unit 1 those from {8, 24, 0, 16}[q] on. x has the same order.
#pragma once

#include "lora_linear_product.cuh"

namespace {

constexpr int kFewRows = 32;  // of W in a thread block
constexpr int kFewPieces = 32;
constexpr int kBatch = 4;  // units, the scales of which come together; two pairs

// Shared memory: the decode table, where pieces of x A^T are staged before and the sums of the warps meet after; then h
// and the rows of B. Where h will be, the codes of nested scales: lanes look them up at random.
template <int kXTiles, bool kWide>
struct FewShared {
  static constexpr int kEntry = Shared<kXTiles, kWide>::kEntry;
  static constexpr int kTable = 256 * kEntry;
  static constexpr int kColumns = 8 * kXTiles + 1;  // of the sums: one more, so that rows start at different banks
  static constexpr int kHAt = kTable;
  static constexpr int kBAt = kHAt + 8 * kXTiles * kMaxRank * 4;
  static constexpr int kFlagAt = kBAt + kFewRows * (kMaxRank + 1) * 4;
  static constexpr int kCodesAt = kHAt;
  static_assert(kHAt + 256 * 4 <= kBAt);
  static constexpr int kBytes = kFlagAt + 16;
};

template <int kXTiles>
using FewMemory = FewShared<kXTiles, Memory<kXTiles>::kEntry == 256>;

inline int few_warps(int capability, unsigned tiles, int multiprocessors) {
  if (capability < 80) return 8;  // 64 KB of shared memory hold the sums of no more
  return tiles <= static_cast<unsigned>(multiprocessors) ? 16 : 8;
}

template <typename T, int kXTiles>
struct FewRows {
  using Mine = FewMemory<kXTiles>;
  static constexpr int kEntry = Mine::kEntry;
  // Units whose x is asked for before the first is used, by the registers of 512 threads.
  static constexpr int kXUnits = kXTiles == 1 ? 2 : 1;

  const Call& call;
  unsigned char* const shared;
  const uint32_t lane = lane_id();
  const bool lower = lane % 4 < 2;  // the lane loads unit 0 of a pair
  // From one lane, so that the compiler knows what follows from it to be the same in all.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0), warps = blockDim.x / 32;
  const uint8_t* packed;  // the lane's bytes of its row g
  unsigned below;         // rows of W below that row, at which g + 8, g + 16 and g + 24 end
  const T* x_at;          // the lane's columns of its row of x in unit 0; its other row is 8 further
  int x_apart;            // from there to those in unit 1
  int left;               // units of the warp from the batch on
  bool present[kXTiles];  // there is such a row of x
  unsigned first_block;   // of 64 weights, of row `lane` of the 32
  bool by_four;           // a batch's scales of a row are nested, and their indices one aligned load
  float offset = 0.0f;
  uint4 bytes[2][4] = {};
  uint4 x[kXUnits][kXTiles][2] = {};
  uint32_t absmax;  // by_four: as they are stored
  float nested;
  float scale[2] = {};  // of a pair
  float sum[2][kXTiles][4] = {};

  __device__ __forceinline__ FewRows(const Call& c, unsigned char* s) : call(c), shared(s) {}

  // Warps have whole batches; the last of a row may lack units.
  __device__ __forceinline__ int first_batch(int of_warp) const {
    return of_warp * static_cast<int>((call.plan.units + kBatch - 1) / kBatch) / warps;
  }

  // Rows past the last of W are read as the last, and not stored.
  __device__ __forceinline__ void begin(int batch, int end) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kFewRows, last = call.n - 1;
    const int64_t row = min(first + lane / 4, last);
    packed = call.packed + row * (call.k / 2) + batch * int64_t{kBatch * kUnit / 2} + lane % 4 * 16;
    below = static_cast<unsigned>(min(last - row, int64_t{kFewRows}));
    left = min(end * kBatch, static_cast<int>(call.plan.units)) - batch * kBatch;
    first_block = static_cast<unsigned>(min(first + lane, last)) * call.plan.units + batch * kBatch;
    by_four = call.scales.nested() && call.scales.shift == 6 && call.plan.units % kBatch == 0 &&
              reinterpret_cast<uintptr_t>(call.scales.absmax) % kBatch == 0;
    const int x_row = static_cast<int>(lane / 4) < call.rows ? lane / 4 : 0;
    x_at = static_cast<const T*>(call.x) + x_row * call.x_stride + batch * int64_t{kBatch * kUnit} + lane % 2 * 32 +
           (lower ? 0 : 16);
    x_apart = lower ? kUnit + 16 : kUnit - 16;
    if (call.scales.nested()) offset = __ldg(call.scales.offset);
#pragma unroll
    for (int m = 0; m < kXTiles; ++m) present[m] = m * 8 + static_cast<int>(lane / 4) < call.rows;
  }

  // Asks for pair `ahead` (counted from the batch's first) of W, which replaces the one two before.
  template <int kAhead>
  __device__ __forceinline__ void load_bytes() {
    const unsigned most = kFewFresh ? fresh(below) : below;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint8_t* from = packed + int64_t{min(8u * i, most)} * static_cast<uint32_t>(call.k / 2) + kAhead * kUnit;
      load_stream_16(bytes[kAhead % 2][i], from, left > 2 * kAhead + (lower ? 0 : 1));
    }
  }

  // Asks for x of unit `ahead`, likewise. Where there is no such row, zeros stay. kUsual: call.aligned is known.
  template <bool kUsual>
  __device__ __forceinline__ void load_x(int ahead) {
#pragma unroll
    for (int m = 0; m < kXTiles; ++m) {
      uint4(&to)[2] = x[ahead % kXUnits][m];
      const T* from = x_at + m * 8 * call.x_stride + ahead / 2 * 2 * kUnit + ahead % 2 * x_apart;
      const bool wanted = present[m] && left > ahead;
      if (kUsual || call.aligned) {
        load_16(to[0], from, wanted);
        load_16(to[1], from + 8, wanted);
      } else {
        gather(to[0], from, wanted);
        gather(to[1], from + 8, wanted);
      }
    }
  }

  // A loop, to be little code: it is rare.
  static __device__ __forceinline__ void gather(uint4& to, const T* from, bool wanted) {
#pragma unroll 1
    for (int i = 0; i < 8; i += 2) {
      const uint32_t pair = wanted ? bits_of(from[i]) | bits_of(from[i + 1]) << 16 : 0;
      to = make_uint4(to.y, to.z, to.w, pair);
    }
  }

  // Asks for the scales of a batch: those of row `lane` of the 32. Unless they come by one load, only L2 is asked, for
  // which no registers are held. kUsual: by_four is known.
  template <bool kUsual>
  __device__ __forceinline__ void load_scales(unsigned first) {
    const uint8_t* stored = static_cast<const uint8_t*>(call.scales.absmax);
    if (kUsual || by_four) {
      absmax = __ldg(reinterpret_cast<const uint32_t*>(stored + first));
      nested = __ldg(call.scales.nested_absmax + (first >> 8));
    } else {
      prefetch(stored + static_cast<int64_t>(first >> (call.scales.shift - 6)) * (call.scales.nested() ? 1 : 4));
    }
  }

  // The scales of a pair of the batch that was asked for. Two roundings, as in Scales::undo.
  template <int kPair, bool kUsual>
  __device__ __forceinline__ void resolve_scales() {
    const float* codes = reinterpret_cast<const float*>(shared + Mine::kCodesAt);
    if (kUsual || by_four) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scale[i] = __fadd_rn(__fmul_rn(codes[absmax >> (8 * (2 * kPair + i)) & 255], nested), offset) *
                   (1.0f / kCodeFactor<T>);
      }
      return;
    }
#pragma unroll 1
    for (int i = 2 * kPair; i < 2 * kPair + 2; ++i) {
      const unsigned block = min(first_block + i, call.blocks - 1) >> (call.scales.shift - 6);
      const float found =
          call.scales.nested() ? call.scales.template of<true>(block) : call.scales.template of<false>(block);
      scale[0] = scale[1], scale[1] = found * (1.0f / kCodeFactor<T>);
    }
  }

  // Adds the products of a pair of the batch, which is whole or has `left` units.
  template <int kPair, bool kWhole, bool kUsual>
  __device__ __forceinline__ void multiply() {
    const uint32_t lane4 = lane * 4;
    uint2 word[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 mine = bytes[kPair][i];
      const uint2 other = make_uint2(__shfl_xor_sync(0xffffffffu, mine.z, 2), __shfl_xor_sync(0xffffffffu, mine.w, 2));
      word[0][i] = make_uint2(lower ? mine.x : other.x, lower ? mine.y : other.y);
      word[1][i] = make_uint2(lower ? other.x : mine.x, lower ? other.y : mine.y);
    }
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      if (!kWhole && 2 * kPair + unit >= left) break;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        uint32_t a[4][4];
        float of_row[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint2 codes = word[unit][2 * t + half];
          a[0][half] = decode<0, kEntry>(shared, codes.x, lane4);
          a[0][half + 2] = decode<1, kEntry>(shared, codes.x, lane4);
          a[1][half] = decode<2, kEntry>(shared, codes.x, lane4);
          a[1][half + 2] = decode<3, kEntry>(shared, codes.x, lane4);
          a[2][half] = decode<0, kEntry>(shared, codes.y, lane4);
          a[2][half + 2] = decode<1, kEntry>(shared, codes.y, lane4);
          a[3][half] = decode<2, kEntry>(shared, codes.y, lane4);
          a[3][half + 2] = decode<3, kEntry>(shared, codes.y, lane4);
          of_row[half] = __shfl_sync(0xffffffffu, scale[unit], lane / 4 + 8 * (2 * t + half));
        }
#pragma unroll
        for (int m = 0; m < kXTiles; ++m) {
          const uint4 low = x[unit % kXUnits][m][0], high = x[unit % kXUnits][m][1];
          const uint32_t b[4][2] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
          float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
          for (int j = 0; j < 4; ++j) mma(T(), product, a[j], b[j], product);
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[t][m][c] = fmaf(product[c], of_row[c / 2], sum[t][m][c]);
        }
      }
      load_x<kUsual>(2 * kPair + unit + kXUnits);
    }
  }

  // A whole batch: its pairs are multiplied, and those of the next asked for.
  template <bool kUsual>
  __device__ __forceinline__ void step() {
    resolve_scales<0, kUsual>();
    multiply<0, true, kUsual>();
    load_bytes<2>();
    if (static_cast<int>(fresh(left)) <= 0) return;  // never; ptxas would put the loads off, but not past a branch
    resolve_scales<1, kUsual>();
    load_scales<kUsual>(first_block + (left > kBatch ? kBatch : 0));
    multiply<1, true, kUsual>();
    load_bytes<3>();
    left -= kBatch;
    packed += kBatch * kUnit / 2;
    first_block += kBatch;
    x_at += kBatch * kUnit;
  }

  // A piece of x A^T: units first .. last, staged where the decode table will be. Threads share the outputs, and the
  // columns of an output where there are more threads.
  __device__ void piece(unsigned number) {
    const int rank = call.rank, outputs = call.rows * rank, threads = blockDim.x;
    const int64_t first = static_cast<int64_t>(number) * call.plan.units / call.plan.pieces * kUnit;
    const int64_t last = static_cast<int64_t>(number + 1) * call.plan.units / call.plan.pieces * kUnit;
    // as many as fit, and one more in a row, so that rows start at different banks
    const int columns = (Mine::kTable / 4 / (rank + call.rows) - 1) / kUnit * kUnit, stride = columns + 1;
    const int apart = threads / outputs > 0 ? threads / outputs : 1;  // threads that share the columns of an output
    float* staged_a = reinterpret_cast<float*>(shared);
    float* staged_x = staged_a + rank * stride;
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // outputs / threads is at most 16 * 64 / 256
    for (int64_t start = first; start < last; start += columns) {
      const int here = static_cast<int>(last - start < columns ? last - start : columns);
      for (int i = threadIdx.x; i < rank * here; i += threads) {
        const int r = i / here, c = i % here;
        staged_a[r * stride + c] = load_adapter<T>(call, call.lora_a, r * call.k + start + c);
      }
      for (int i = threadIdx.x; i < call.rows * here; i += threads) {
        const int m = i / here, c = i % here;
        staged_x[m * stride + c] = widen(static_cast<const T*>(call.x)[m * call.x_stride + start + c]);
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = apart > 1 ? threadIdx.x % outputs : threadIdx.x + i * threads;
        if (output >= outputs || (apart > 1 && i > 0)) break;
        const float* a = staged_a + output % rank * stride;
        const float* from = staged_x + output / rank * stride;
        const int mine = threadIdx.x / outputs;
        if (apart > 1 && mine >= apart) break;
#pragma unroll 8
        for (int c = apart > 1 ? mine : 0; c < here; c += apart) total[i] = fmaf(from[c], a[c], total[i]);
      }
      __syncthreads();
    }
    float* to = call.workspace.pieces + static_cast<int64_t>(number) * outputs;
    if (apart == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = threadIdx.x + i * threads;
        if (output < outputs) to[output] = total[i];
      }
    } else {
      if (static_cast<int>(threadIdx.x) < apart * outputs) staged_a[threadIdx.x] = total[0];
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < outputs) {
        float value = 0.0f;
        for (int i = 0; i < apart; ++i) value += staged_a[i * outputs + threadIdx.x];
        to[threadIdx.x] = value;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) arrive(call.workspace.pieces_done);
  }

  // The rows of B that this block needs, while others still compute pieces; then h, when all are there.
  __device__ void bring_adapter(float* h, float* b) {
    const int rank = call.rank, outputs = call.rows * rank;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kFewRows;
    for (int i = threadIdx.x; i < kFewRows * rank; i += blockDim.x) {
      const int64_t row = first + i / rank;
      b[i / rank * (rank + 1) + i % rank] = row < call.n ? load_adapter<T>(call, call.lora_b, first * rank + i) : 0.0f;
    }
    if (threadIdx.x == 0) {
      wait_for(call.workspace.pieces_done, call.plan.pieces);
      // Whoever is last to have seen all pieces makes the counters ready for the next launch.
      unsigned* seen = call.workspace.tile_arrivals;
      const bool last = atomicAdd(seen, 1u) == gridDim.x - 1;
      __threadfence();
      if (last) *seen = 0, *call.workspace.pieces_done = 0, seen[1] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < outputs; i += blockDim.x) {
      float value = 0.0f;
#pragma unroll 8
      for (unsigned from = 0; from < call.plan.pieces; ++from) value += call.workspace.pieces[from * outputs + i];
      h[i] = value;
      if (blockIdx.x == 0 && call.h != nullptr) call.h[i] = value;
    }
  }

  __device__ __forceinline__ void store_sums(float* sums) const {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int m = 0; m < kXTiles; ++m) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row = t * 16 + c / 2 * 8 + static_cast<int>(lane / 4);
          sums[(warp * kFewRows + row) * Mine::kColumns + m * 8 + static_cast<int>(lane % 4) * 2 + c % 2] =
              sum[t][m][c];
        }
      }
    }
  }

  __device__ void finish(const float* sums, const float* h, const float* b) const {
    const int rank = call.rank;
    for (int i = threadIdx.x; i < kFewRows * call.rows; i += blockDim.x) {
      const int row = i % kFewRows, m = i / kFewRows;
      const int64_t n = static_cast<int64_t>(blockIdx.x) * kFewRows + row;
      if (n >= call.n) continue;
      float value = call.bias == nullptr ? 0.0f : widen(static_cast<const T*>(call.bias)[n]);
      for (int w = 0; w < warps; ++w) value += sums[(w * kFewRows + row) * Mine::kColumns + m];
      float adapter = 0.0f;
      for (int r = 0; r < rank; ++r) adapter = fmaf(h[m * rank + r], b[row * (rank + 1) + r], adapter);
      round_to(static_cast<T*>(call.y) + m * call.n + n, fmaf(call.scaling, adapter, value));
    }
  }

  __device__ __forceinline__ void run() {
    begin(first_batch(warp), first_batch(warp + 1));
    load_bytes<0>();
    load_bytes<1>();
    if (call.rank > 0) {
      unsigned* flag = reinterpret_cast<unsigned*>(shared + Mine::kFlagAt);
      if (threadIdx.x == 0) *flag = atomicAdd(call.workspace.tile_arrivals + 1, 1u);
      __syncthreads();
      // Who comes first computes: no block waits for one that has not started.
      if (*flag < call.plan.pieces) piece(*flag);
      __syncthreads();
    }
    if (left > 0) load_scales<false>(first_block);
#pragma unroll
    for (int i = 0; i < kXUnits; ++i) load_x<false>(i);
    fill_decode_table<T, kEntry>(shared);
    if (call.scales.nested() && threadIdx.x < 256) {
      reinterpret_cast<float*>(shared + Mine::kCodesAt)[threadIdx.x] = __ldg(absmax_code.value + threadIdx.x);
    }
    __syncthreads();
    if (by_four && call.aligned) {
      while (left >= kBatch) step<true>();
    } else {
      while (left >= kBatch) step<false>();
    }
    if (left > 0) {
      resolve_scales<0, false>();
      multiply<0, false, false>();
      resolve_scales<1, false>();
      multiply<1, false, false>();
    }
    __syncthreads();  // the table is no longer read
    float* sums = reinterpret_cast<float*>(shared);
    float* h = reinterpret_cast<float*>(shared + Mine::kHAt);
    float* b = reinterpret_cast<float*>(shared + Mine::kBAt);
    store_sums(sums);
    if (call.rank > 0) bring_adapter(h, b);
    __syncthreads();
    finish(sums, h, b);
  }
};

template <typename T, int kXTiles>
__global__ void __launch_bounds__(512, 1) few_rows_kernel(const Call call) {
  PE_DYNAMIC_SHARED(unsigned char, shared);
  FewRows<T, kXTiles>(call, shared).run();
}

}  // namespace
