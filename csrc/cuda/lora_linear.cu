// y = x W^T + bias + scaling * (x A^T) B^T in one launch, for 1 to 64 rows of x and W in NF4; the maths and the reference
// are in peft_engine/ops/lora_linear.py.
//
// Floor: the packed bytes over the memory bandwidth, 0.5 a weight and the scales; the arithmetic must fit below it.
// The work is divided by lora_linear_plan.cuh; thread blocks either multiply (lora_linear_product.cuh) or compute
// x A^T (lora_linear_adapter.cuh), and who delivers the last part of a tile of y finishes it (lora_linear_finish.cuh).
// Sums are always added in the same order. Up to 16 rows take the kernel of lora_linear_few.cuh.

#include "lora_linear_adapter.cuh"
#include "lora_linear_few.cuh"

namespace {

template <typename T, int kXTiles>
__global__ void __launch_bounds__(kThreads, kFit < resident(kXTiles) ? kFit : resident(kXTiles))
    lora_linear_kernel(const Call call) {
  PE_DYNAMIC_SHARED(unsigned char, shared);
  const auto fill = [&] { fill_decode_table<T, Memory<kXTiles>::kEntry>(shared); };
  unsigned* flag = reinterpret_cast<unsigned*>(shared + Memory<kXTiles>::kFlagsAt);
  unsigned number = blockIdx.x;
  if (call.rank > 0) {
    number = number_by_start(call.workspace.started, gridDim.x, flag, fill);
  } else {
    fill();  // nobody waits
  }
  if (number < call.plan.pieces) {
    adapter_block<T, kXTiles>(call, number, shared);
  } else {
    Product<T, kXTiles>(call, shared).run(number - call.plan.pieces);
  }
}

struct Device {
  int number = 0, multiprocessors = 0, shared_bytes = 0, capability = 0;
};

cudaError_t ask(int device, Device* found) {
  int major = 0, minor = 0;
  cudaError_t error = pe::device_attribute<cudaDevAttrMultiProcessorCount>(&found->multiprocessors, device);
  if (error == cudaSuccess) {
    error = pe::device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(&found->shared_bytes, device);
  }
  if (error == cudaSuccess) error = pe::device_attribute<cudaDevAttrComputeCapabilityMajor>(&major, device);
  if (error == cudaSuccess) error = pe::device_attribute<cudaDevAttrComputeCapabilityMinor>(&minor, device);
  found->number = device, found->capability = 10 * major + minor;
  return error;
}

template <int kXTiles>
int shared_bytes(const Device& device) {
  return device.capability >= 80 ? Shared<kXTiles, true>::kBytes : Shared<kXTiles, false>::kBytes;
}

template <int kXTiles>
Plan plan_for(const Device& device, int rows, int64_t n, int64_t k, int rank) {
  const int fit = (device.shared_bytes + 1024) / (shared_bytes<kXTiles>(device) + 1024);  // 1 KB is CUDA's in each
  const int most = resident(kXTiles);
  return plan_of(rows, n, k, rank, device.multiprocessors, fit < 1 ? 1 : fit < most ? fit : most);
}

// What a call with kXTiles n-tiles needs of the workspace, or (call not null) the call.
template <int kXTiles>
int64_t workspace_for(const Device& device, int rows, int64_t n, int64_t k, int rank) {
  return workspace_bytes(plan_for<kXTiles>(device, rows, n, k, rank), kXTiles);
}

template <typename T, int kXTiles>
cudaError_t launch(Call& call, const Device& device, cudaStream_t stream) {
  call.plan = plan_for<kXTiles>(device, call.rows, call.n, call.k, call.rank);
  if (call.plan.tiles + 4 > kCounters) return cudaErrorInvalidValue;
  const int bytes = shared_bytes<kXTiles>(device);
  static std::atomic<uint64_t> allowed{0};
  const cudaError_t error = pe::allow_shared(lora_linear_kernel<T, kXTiles>, bytes, device.number, &allowed);
  if (error != cudaSuccess) return error;
  const unsigned grid = call.plan.pieces + call.plan.workers;
  PE_LAUNCH((lora_linear_kernel<T, kXTiles>), grid, kThreads, bytes, stream, call);
  return cudaGetLastError();
}

template <typename T, int kXTiles>
cudaError_t launch_few(Call& call, const Device& device, cudaStream_t stream) {
  const int64_t tiles = (call.n + kFewRows - 1) / kFewRows;
  call.plan = {};
  call.plan.units = static_cast<unsigned>(call.k / kUnit);
  const unsigned most = call.plan.units < kFewPieces ? call.plan.units : kFewPieces;
  if (call.rank > 0) {
    // No more than blocks that run at once: those wait for the pieces of all.
    const unsigned at_once = min(static_cast<unsigned>(device.multiprocessors), most);
    call.plan.pieces = tiles < at_once ? static_cast<unsigned>(tiles) : at_once;
  }
  const int bytes = device.capability >= 80 ? FewShared<kXTiles, true>::kBytes : FewShared<kXTiles, false>::kBytes;
  static std::atomic<uint64_t> allowed{0};
  const cudaError_t error = pe::allow_shared(few_rows_kernel<T, kXTiles>, bytes, device.number, &allowed);
  if (error != cudaSuccess) return error;
  const int warps = few_warps(device.capability, static_cast<unsigned>(tiles), device.multiprocessors);
  PE_LAUNCH((few_rows_kernel<T, kXTiles>), static_cast<unsigned>(tiles), warps * 32, bytes, stream, call);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(Call& call, const Device& device, cudaStream_t stream) {
  switch (x_tiles_of(call.rows)) {
    case 1:
      return launch_few<T, 1>(call, device, stream);
    case 2:
      return launch_few<T, 2>(call, device, stream);
    case 4:
      return launch<T, 4>(call, device, stream);
    default:
      return launch<T, 8>(call, device, stream);
  }
}

// Units, and blocks of 64 weights up to a whole tile, are counted in 32 bits.
bool in_range(int rows, int64_t n, int64_t k, int rank) {
  return rows >= 0 && rows <= kMaxRows && rank >= 0 && rank <= kMaxRank && n >= 0 && k > 0 && k % kUnit == 0 &&
         (n / 256 + 1) * 256 * (k / kUnit) <= INT32_MAX;
}

}  // namespace

// Bytes of scratch, zero at first, that calls of these sizes need; -1 where they are refused.
PE_API int64_t pe_lora_linear_workspace(int rows, int64_t n, int64_t k, int rank, int device) {
  Device found;
  if (!in_range(rows, n, k, rank) || ask(device, &found) != cudaSuccess) return -1;
  if (rows == 0 || n == 0) return 0;
  switch (x_tiles_of(rows)) {
    case 1:
    case 2:
      return rank > 0 ? fixed_bytes() : 0;
    case 4:
      return workspace_for<4>(found, rows, n, k, rank);
    default:
      return workspace_for<8>(found, rows, n, k, rank);
  }
}

PE_API int pe_lora_linear_nf4(const void* x, int64_t x_stride, int rows, int64_t k, const void* packed,
                              const void* absmax, const float* nested_absmax, const float* offset, int blocksize,
                              int64_t n, const void* lora_a, const void* lora_b, int rank, int adapter_dtype,
                              float scaling, const void* bias, void* y, int dtype, float* h, void* workspace,
                              int device, void* stream) {
  if (!in_range(rows, n, k, rank) || !is_blocksize(blocksize)) return cudaErrorInvalidValue;
  if (dtype != pe::kFloat16 && dtype != pe::kBfloat16) return cudaErrorInvalidValue;
  if (rank > 0 && adapter_dtype != pe::kFloat32 && adapter_dtype != dtype) return cudaErrorInvalidValue;
  if (rows == 0 || n == 0) return cudaSuccess;
  const pe::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  Device found;
  const cudaError_t error = ask(device, &found);
  if (error != cudaSuccess) return error;
  if (found.capability < (dtype == pe::kBfloat16 ? 80 : 75)) return cudaErrorNotSupported;
  Call call{};
  call.x = x, call.x_stride = x_stride, call.rows = rows, call.k = k, call.n = n;
  call.packed = static_cast<const uint8_t*>(packed);
  call.scales = {absmax, nested_absmax, offset, log2_of(blocksize)};
  call.blocks = static_cast<unsigned>(n * (k / kUnit));
  call.lora_a = lora_a, call.lora_b = lora_b, call.rank = rank, call.scaling = scaling, call.h = h;
  call.wide_adapter = adapter_dtype == pe::kFloat32;
  call.aligned = pe::aligned16(x) && x_stride % 8 == 0;
  call.bias = bias, call.y = y, call.workspace = workspace_at(workspace);
  if (dtype == pe::kFloat16) return launch<__half>(call, found, (cudaStream_t)stream);
  return launch<__nv_bfloat16>(call, found, (cudaStream_t)stream);
}
