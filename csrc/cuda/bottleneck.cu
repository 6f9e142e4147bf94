// y = residual + scaling (act(LN(x) Wd^T + bd) Wu^T + bu) in one launch, for 1 to 16 rows of x; the maths and the reference
// are in peft_engine/ops/bottleneck.py. Forward only.
//
// Floor: the bytes of Wd and Wu, each read once, over the bandwidth; for 4096 features, width 64, half precision 1 MB, a
// quarter of a microsecond. What takes the time is latency, so it is one launch: thread blocks take pieces of the width
// and compute the middle over all columns (bottleneck_down.cuh); when all of it is there, every block has columns of y
// (bottleneck_up.cuh), the weights of which were asked for meanwhile.
// A block that runs takes the next piece, and waits only when all are taken: it waits for no block that has not started.
// Sums are always added in the same order, which does not depend on the number of rows.

#include "bottleneck_down.cuh"
#include "bottleneck_up.cuh"

namespace {

// Asks L2 for rows first, first + 1, ... of a weight, `count` of them, as far as they are there.
template <typename W>
__device__ __forceinline__ void ask_for_rows(const void* weight, int64_t first, int count, int64_t rows, int columns) {
  const int64_t row = int64_t{columns} * static_cast<int>(sizeof(W)), bytes = min(int64_t{count}, rows - first) * row;
  const char* from = static_cast<const char*>(weight) + first * row;
  for (int64_t at = threadIdx.x * 128; at < bytes; at += kThreads * 128) prefetch(from + at);
}

template <typename T, typename W, int kN>
__global__ void __launch_bounds__(kThreads, 1) bottleneck_kernel(const Call call) {
  PE_DYNAMIC_SHARED(unsigned char, shared);
  unsigned* flag = reinterpret_cast<unsigned*>(shared + Memory<kN>::kFlagAt);
  const unsigned number = number_by_start(&call.counters->started, call.pieces + gridDim.x, flag, [&] {
    // While the number is on its way: the piece that it names where blocks start in order (in another order some other
    // block asks for it), and this block's columns of y.
    ask_for_rows<W>(call.down_weight, int64_t{blockIdx.x} * kTile, kTile, call.width, call.features);
    ask_for_rows<W>(call.up_weight, int64_t{blockIdx.x} * kColumns, kColumns, call.features, call.width);
  });
  if (call.aligned_down) {
    Down<T, W, kN>{call, shared}.template run_from<true>(number);
  } else {
    Down<T, W, kN>{call, shared}.template run_from<false>(number);
  }
  if (call.aligned_up) {
    Up<T, W, kN>{call, shared}.template run<true>();
  } else {
    Up<T, W, kN>{call, shared}.template run<false>();
  }
}

template <typename T, typename W, int kN>
cudaError_t launch(Call& call, int multiprocessors, cudaStream_t stream) {
  call.pieces = static_cast<unsigned>((call.width + kTile - 1) / kTile);
  call.tiles = static_cast<unsigned>((call.features + kColumns - 1) / kColumns);
  const unsigned wanted = call.pieces > call.tiles ? call.pieces : call.tiles;
  const unsigned grid = wanted < static_cast<unsigned>(multiprocessors) ? wanted : multiprocessors;
  const int bytes = Memory<kN>::kActivatedAt + call.rows * padded<W>(call.width) * static_cast<int>(sizeof(W));
  PE_LAUNCH((bottleneck_kernel<T, W, kN>), grid, kThreads, bytes, stream, call);
  return cudaGetLastError();
}

template <typename T, typename W>
cudaError_t launch_for(Call& call, int multiprocessors, cudaStream_t stream) {
  constexpr int kPerX = 16 / sizeof(T), kPerW = 16 / sizeof(W);
  call.aligned_down = pe::aligned16(call.x) && pe::aligned16(call.down_weight) && call.features % kPerX == 0;
  call.aligned_up = pe::aligned16(call.up_weight) && call.width % kPerW == 0;
  if (call.rows <= 4) return launch<T, W, 4>(call, multiprocessors, stream);
  return launch<T, W, kMaxRows>(call, multiprocessors, stream);
}

template <typename T>
cudaError_t launch_for_weights(Call& call, bool wide, int multiprocessors, cudaStream_t stream) {
  if (wide) return launch_for<T, float>(call, multiprocessors, stream);
  return launch_for<T, T>(call, multiprocessors, stream);
}

// Counters, and the activated middle.
constexpr int64_t kActivatedAt = 64;
constexpr int64_t kWorkspaceBytes = kActivatedAt + int64_t{kMaxRows} * kMaxWidth * 4;

bool is_dtype(int code) { return code == pe::kFloat32 || code == pe::kFloat16 || code == pe::kBfloat16; }

}  // namespace

// Bytes of scratch, zero at first, that a call needs.
PE_API int64_t pe_bottleneck_workspace() { return kWorkspaceBytes; }

// residual is x itself or another; biases and the norm's weight and bias may be null; middle (rows, width) is of the
// weights' dtype, stats (rows, 2) is written where there is a norm.
PE_API int pe_bottleneck_forward(const void* x, const void* residual, int rows, int64_t features,
                                 const void* down_weight, const void* down_bias, const void* up_weight,
                                 const void* up_bias, int width, const void* norm_weight, const void* norm_bias,
                                 float eps, int activation, float scaling, int dtype, int weight_dtype, int norm_dtype,
                                 void* y, void* middle, float* stats, void* workspace, int device, void* stream) {
  if (rows < 0 || rows > kMaxRows || features <= 0 || features > INT32_MAX / 2 || width <= 0 || width > kMaxWidth) {
    return cudaErrorInvalidValue;
  }
  if (!is_dtype(dtype) || (weight_dtype != dtype && weight_dtype != pe::kFloat32)) return cudaErrorInvalidValue;
  if (norm_weight != nullptr && norm_dtype != dtype && norm_dtype != pe::kFloat32) return cudaErrorInvalidValue;
  if (activation < kRelu || activation > kTanh) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const pe::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  int multiprocessors = 0;
  const cudaError_t error = pe::device_attribute<cudaDevAttrMultiProcessorCount>(&multiprocessors, device);
  if (error != cudaSuccess) return error;
  Call call{};
  call.x = x, call.residual = residual, call.rows = rows, call.features = static_cast<int>(features);
  call.down_weight = down_weight, call.down_bias = down_bias, call.up_weight = up_weight, call.up_bias = up_bias;
  call.width = width, call.norm_weight = norm_weight, call.norm_bias = norm_bias;
  call.wide_norm = norm_dtype == pe::kFloat32, call.eps = eps;
  call.activation = activation, call.scaling = scaling;
  call.y = y, call.middle = middle, call.stats = stats;
  call.counters = static_cast<Counters*>(workspace);
  call.activated = static_cast<char*>(workspace) + kActivatedAt;
  const bool wide = weight_dtype == pe::kFloat32;
  if (dtype == pe::kFloat32) return launch_for_weights<float>(call, wide, multiprocessors, (cudaStream_t)stream);
  if (dtype == pe::kFloat16) return launch_for_weights<__half>(call, wide, multiprocessors, (cudaStream_t)stream);
  return launch_for_weights<__nv_bfloat16>(call, wide, multiprocessors, (cudaStream_t)stream);
}
