// NF4 to dense in one launch: out = round(code[index] * scale), the bits of peft_engine/ops/nf4.py. Any shape, row stride
// and alignment. The fast kernels take pieces of 64 weights, the plain one the rest.
//
// Floor: bytes, 0.53 read and 2 written for a 16-bit weight. Instructions must stay below what hides behind them.

#include "launch.h"
#include "ptx.cuh"
#include "scale.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 64;    // weights of two neighbouring lanes: in one block, whatever its size
constexpr int kRounds32 = 2;  // times 32 weights, of a thread with float32 results

// Weight i of the flat weight goes to out[i + (i / columns) * gap].
struct Work {
  const uint8_t* packed;
  Scales scales;
  void* out;
  int64_t columns;
  int64_t gap;       // out_stride - columns
  uint64_t inverse;  // floor(2^64 / pieces in a row) + 1, for a division in four multiplications; 0: gap is 0
};

__device__ __forceinline__ void store(float* out, float value) { *out = value; }
__device__ __forceinline__ void store(__half* out, float value) { *out = __float2half_rn(value); }
__device__ __forceinline__ void store(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }

// The plain loop: a thread takes one weight at a time, from `first` to `last`.
template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_plain(Work work, int64_t first, int64_t last) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < last; i += step) {
    const int byte = __ldg(work.packed + (i >> 1));
    const int64_t block = i >> work.scales.shift;
    const float scale = work.scales.nested() ? work.scales.of<true>(block) : work.scales.of<false>(block);
    const float value = __fmul_rn(__ldg(nf4_code.value + (i & 1 ? byte & 15 : byte >> 4)), scale);
    const int64_t row = work.gap == 0 ? 0 : i / work.columns;
    store(static_cast<T*>(work.out) + i + row * work.gap, value);
  }
}

// Where a piece begins in `out`. Pieces are fewer than 2^31, for which the division is exact.
template <bool kStrided>
__device__ __forceinline__ int64_t begin_of(const Work& work, uint32_t piece) {
  if (!kStrided) return static_cast<int64_t>(piece) * kPiece;
  const uint64_t low = (work.inverse & 0xffffffffu) * piece >> 32;
  const uint32_t row = ((work.inverse >> 32) * piece + low) >> 32;
  return static_cast<int64_t>(piece) * kPiece + row * work.gap;
}

__device__ __forceinline__ uint32_t pair_bits(__half, float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pair_bits(__nv_bfloat16, float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The block's 16 results, kept as their low bytes and their high bytes, 4 in a register: PRMT then looks up four weights
// at once, in 8 of the 16 entries, by indices that it takes as they are packed.
struct Lookup {
  uint32_t low[4], high[4];

  template <typename T>
  __device__ __forceinline__ void fill(T, float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* code = nf4_code.value + 4 * i;  // constants, once the loop is unrolled
      const uint32_t a = pair_bits(T(), __fmul_rn(code[0], scale), __fmul_rn(code[1], scale));
      const uint32_t b = pair_bits(T(), __fmul_rn(code[2], scale), __fmul_rn(code[3], scale));
      low[i] = __byte_perm(a, b, 0x6420);
      high[i] = __byte_perm(a, b, 0x7531);
    }
  }

  // The weights of two packed bytes. `index`: the low three bits of four nibbles. `half`: for each, its place among
  // what the lower 8 entries gave (0..3) or the upper 8 (4..7). A byte's high nibble is the first weight.
  __device__ __forceinline__ uint2 of(uint32_t index, uint32_t half) const {
    const uint32_t lows = prmt(prmt(low[0], low[1], index), prmt(low[2], low[3], index), half);
    const uint32_t highs = prmt(prmt(high[0], high[1], index), prmt(high[2], high[3], index), half);
    return make_uint2(__byte_perm(lows, highs, 0x4051), __byte_perm(lows, highs, 0x6273));
  }

  __device__ __forceinline__ uint4 eight(uint32_t word) const {
    const uint32_t index = word & 0x77777777u, half = (word >> 1 & 0x44444444u) | 0x32103210u;
    const uint2 first = of(index, half), second = of(index >> 16, half >> 16);
    return make_uint4(first.x, first.y, second.x, second.y);
  }
};

// Two neighbouring lanes have a piece of 64 weights and load 16 bytes each. What both are to store side by side must fill
// a sector of 32 bytes: for 16-bit results the even lane takes words 0, 2, 4, 6 of the 8, the odd one 1, 3, 5, 7.
__device__ __forceinline__ uint4 share_words(uint4 mine) {
  const bool odd = threadIdx.x & 1;
  const uint32_t first = __shfl_xor_sync(0xffffffffu, odd ? mine.x : mine.y, 1);
  const uint32_t second = __shfl_xor_sync(0xffffffffu, odd ? mine.z : mine.w, 1);
  return odd ? make_uint4(first, second, mine.y, mine.w) : make_uint4(mine.x, mine.z, first, second);
}

// For float32 results: the even lane takes the first 2 bytes of all 8 words, the odd one the last.
__device__ __forceinline__ uint4 share_halves(uint4 mine) {
  const bool odd = threadIdx.x & 1;
  const uint32_t kept = odd ? 0x7632 : 0x5410, given = odd ? 0x5410 : 0x7632;
  const uint32_t a = __byte_perm(mine.x, mine.y, kept), b = __byte_perm(mine.z, mine.w, kept);
  const uint32_t c = __shfl_xor_sync(0xffffffffu, __byte_perm(mine.x, mine.y, given), 1);
  const uint32_t d = __shfl_xor_sync(0xffffffffu, __byte_perm(mine.z, mine.w, given), 1);
  return odd ? make_uint4(c, d, a, b) : make_uint4(a, b, c, d);
}

// 16-bit results. A thread has 32 weights, and every thread has some: no bounds are checked.
template <typename T, bool kNested, bool kStrided>
__global__ void __launch_bounds__(kThreads) dequantize_16bit(Work work) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, piece = thread / 2;
  const float scale = work.scales.of<kNested>(piece >> (work.scales.shift - 6));
  const uint4 words = share_words(__ldg(reinterpret_cast<const uint4*>(work.packed) + thread));
  Lookup lookup;
  lookup.fill(T(), scale);
  uint4* out = reinterpret_cast<uint4*>(static_cast<T*>(work.out) + begin_of<kStrided>(work, piece)) + thread % 2;
  out[0] = lookup.eight(words.x);
  out[2] = lookup.eight(words.y);
  out[4] = lookup.eight(words.z);
  out[6] = lookup.eight(words.w);
}

// float32 results. A thread has twice 32 weights; the 16 codes lie in shared memory, for each lane in its own bank.
template <bool kNested, bool kStrided>
__global__ void __launch_bounds__(kThreads) dequantize_32bit(Work work) {
  __shared__ float codes[16 * 32];
  const uint32_t first = blockIdx.x * (kRounds32 * kThreads) + threadIdx.x, lane4 = lane_id() * 4;
  uint4 words[kRounds32];
  float scale[kRounds32];
#pragma unroll
  for (int i = 0; i < kRounds32; ++i) {
    const uint32_t thread = first + i * kThreads;
    words[i] = __ldg(reinterpret_cast<const uint4*>(work.packed) + thread);
    scale[i] = work.scales.of<kNested>((thread / 2) >> (work.scales.shift - 6));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) codes[i * kThreads + threadIdx.x] = __ldg(nf4_code.value + i * 8 + threadIdx.x / 32);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRounds32; ++i) {
    const uint32_t thread = first + i * kThreads;
    const uint4 halves = share_halves(words[i]);
    const uint32_t word[4] = {halves.x, halves.y, halves.z, halves.w};
    float4* out =
        reinterpret_cast<float4*>(static_cast<float*>(work.out) + begin_of<kStrided>(work, thread / 2)) + thread % 2;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float value[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // the high nibble of a byte comes first; an entry's lanes take 128 bytes
        const int shift = 16 * (j % 2) + 4 * (k ^ 1);
        const uint32_t at = ((shift < 7 ? word[j / 2] << (7 - shift) : word[j / 2] >> (shift - 7)) & 0x780) | lane4;
        value[k] = __fmul_rn(*reinterpret_cast<const float*>(reinterpret_cast<const char*>(codes) + at), scale[i]);
      }
      out[2 * j] = make_float4(value[0], value[1], value[2], value[3]);
    }
  }
}

template <bool kNested, bool kStrided>
void launch_pieces(float, const Work& work, unsigned grid, cudaStream_t stream) {
  PE_LAUNCH((dequantize_32bit<kNested, kStrided>), grid, kThreads, 0, stream, work);
}

template <bool kNested, bool kStrided, typename T>
void launch_pieces(T, const Work& work, unsigned grid, cudaStream_t stream) {
  PE_LAUNCH((dequantize_16bit<T, kNested, kStrided>), grid, kThreads, 0, stream, work);
}

// Whole thread blocks of pieces; returns how many weights that is.
template <typename T>
int64_t dequantize_pieces(Work work, int64_t numel, cudaStream_t stream) {
  constexpr int kOfBlock = kThreads * 32 * (sizeof(T) == 4 ? kRounds32 : 1);  // weights
  const bool strided = work.gap != 0;
  const unsigned grid = static_cast<unsigned>(numel / kOfBlock);
  if (numel < kOfBlock || numel / kPiece > INT32_MAX || !pe::aligned16(work.packed) || !pe::aligned16(work.out))
    return 0;
  if (strided && (work.columns % kPiece != 0 || work.gap * sizeof(T) % 16 != 0)) return 0;
  if (strided && work.columns == kPiece) return 0;  // the division by 1 has no such inverse
  if (strided) work.inverse = UINT64_MAX / (work.columns / kPiece) + 1;
  if (work.scales.nested_absmax != nullptr) {
    strided ? launch_pieces<true, true>(T(), work, grid, stream) : launch_pieces<true, false>(T(), work, grid, stream);
  } else {
    strided ? launch_pieces<false, true>(T(), work, grid, stream)
            : launch_pieces<false, false>(T(), work, grid, stream);
  }
  return static_cast<int64_t>(grid) * kOfBlock;
}

template <typename T>
cudaError_t dequantize(const Work& work, int64_t numel, cudaStream_t stream) {
  const int64_t done = dequantize_pieces<T>(work, numel, stream);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || done == numel) return error;
  const int64_t blocks = (numel - done + kThreads - 1) / kThreads;
  const unsigned grid = static_cast<unsigned>(blocks < (1 << 20) ? blocks : (1 << 20));
  PE_LAUNCH(dequantize_plain<T>, grid, kThreads, 0, stream, work, done, numel);
  return cudaGetLastError();
}

}  // namespace

// Whether the library can run on a device: the driver is not older than its runtime, and one of its kernels, all of
// which are compiled for the same architectures, is there for this one.
PE_API int pe_cuda_probe(int device) {
  const pe::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  cudaFuncAttributes found;
  return pe::checked(cudaFuncGetAttributes(&found, dequantize_plain<float>));
}

PE_API int pe_nf4_dequantize(const void* packed, const void* absmax, const float* nested_absmax, const float* offset,
                             int blocksize, void* out, int dtype, int64_t rows, int64_t columns, int64_t out_stride,
                             int device, void* stream) {
  if (!is_blocksize(blocksize) || rows < 0 || columns < 0 || (rows > 1 && out_stride < columns)) {
    return cudaErrorInvalidValue;
  }
  const pe::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  const Work work{static_cast<const uint8_t*>(packed),
                  {absmax, nested_absmax, offset, log2_of(blocksize)},
                  out,
                  columns,
                  rows > 1 ? out_stride - columns : 0,
                  0};
  const int64_t numel = rows * columns;
  switch (dtype) {
    case pe::kFloat32:
      return dequantize<float>(work, numel, (cudaStream_t)stream);
    case pe::kFloat16:
      return dequantize<__half>(work, numel, (cudaStream_t)stream);
    case pe::kBfloat16:
      return dequantize<__nv_bfloat16>(work, numel, (cudaStream_t)stream);
    default:
      return cudaErrorInvalidValue;
  }
}
