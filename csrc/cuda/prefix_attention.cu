// Attention over learned keys in front of the real ones, for the few queries of decoding; the maths and the reference are
// in peft_engine/ops/prefix_attention.py. Forward only, no bias.
//
// Floor: bytes over the memory bandwidth: keys and values of every row of the batch read once, 2 batch kv_heads keys
// head_dim numbers; the shared prefix once (what more than one block reads of it comes from L2), the parts that blocks
// exchange, at most a 32nd of what they read. A multiprocessor must have some 20 KB on their way: a block has 16 to 32.
// The arithmetic is float32, 2 x rows products for a number read, which must fit below: for 8 rows of half precision it
// takes about 57 of the 68 cycles in which a multiprocessor of an H100 gets 1 KB. More rows come in tiles of 8, and read
// the keys again, from L2.
// The work is divided by prefix_attention_call.cuh; prefix_attention_keys.cuh attends, prefix_attention_merge.cuh adds up.
// No block waits for another. Sums are always added in the same order.

#include "prefix_attention_merge.cuh"

namespace {

template <typename T, typename S, int kN, int kRows>
__device__ __forceinline__ void attend(const Call& call, const Work& work, unsigned char* shared) {
  Attend<T, S, kN>(call, work, shared).run();
  store_parts<T, S, kN, kRows>(call, work, shared);
}

template <typename T, typename S, int kRows>
__global__ void __launch_bounds__(kThreads, 2) prefix_attention_kernel(const Call call) {
  PE_DYNAMIC_SHARED(unsigned char, shared);
  const Work work = work_of(call, kRows);
  if (kRows == kPrefixRows || work.of_prefix) {
    attend<T, S, kPrefixRows, kRows>(call, work, shared);
  } else {
    attend<T, S, kRows, kRows>(call, work, shared);
  }
  arrive<T, S, kRows>(call, work, shared);
}

template <typename T, typename S>
cudaError_t launch(const Call& call, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>(call.plan.blocks());
  if (rows_of_kernel(call.rows()) == 4) {
    PE_LAUNCH((prefix_attention_kernel<T, S, 4>), grid, kThreads, S::kBytes, stream, call);
  } else {
    PE_LAUNCH((prefix_attention_kernel<T, S, 8>), grid, kThreads, S::kBytes, stream, call);
  }
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_for_width(const Call& call, cudaStream_t stream) {
  constexpr bool kWide = sizeof(T) == 4;
  if (call.head_dim <= 64) return launch<T, Shape<T, kWide ? 16 : 8, 1>>(call, stream);
  if (call.head_dim <= 128) return launch<T, Shape<T, kWide ? 32 : 16, 1>>(call, stream);
  return launch<T, Shape<T, 32, kWide ? 2 : 1>>(call, stream);
}

bool in_range(int batch, int kv_heads, int group, int queries, int keys, int prefix, int head_dim) {
  const int64_t rows = int64_t{group} * queries;
  return batch >= 0 && kv_heads >= 0 && group > 0 && queries >= 0 && keys >= 0 && prefix >= 0 && head_dim > 0 &&
         head_dim <= kMaxHeadDim && rows <= kMaxTargets &&
         int64_t{batch} * kv_heads * ((rows + kPrefixRows - 1) / kPrefixRows) <= kMaxTargets;
}

cudaError_t plan_on(int device, int batch, int kv_heads, int rows, int keys, int prefix, bool shared, Plan* plan) {
  int multiprocessors = 0;
  const cudaError_t error = pe::device_attribute<cudaDevAttrMultiProcessorCount>(&multiprocessors, device);
  if (error == cudaSuccess) *plan = plan_of(batch, kv_heads, rows, keys, prefix, shared, multiprocessors);
  return error;
}

// `strides`: of the batch, the heads and the keys, in elements of `bytes`.
Keys keys_at(const void* data, const int64_t* strides, int bytes, bool wide, int head_dim) {
  bool aligned = pe::aligned16(data) && head_dim * bytes % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && strides[i] * bytes % 16 == 0;
  return {data, strides[0], strides[1], strides[2], wide ? Layout::wide : aligned ? Layout::aligned : Layout::apart};
}

}  // namespace

// Bytes of scratch, zero at first, that calls of these sizes need; 0 where nothing is launched, -1 where they are refused.
PE_API int64_t pe_prefix_attention_workspace(int batch, int kv_heads, int group, int queries, int keys, int prefix,
                                             int head_dim, int shared_prefix, int device) {
  if (!in_range(batch, kv_heads, group, queries, keys, prefix, head_dim)) return -1;
  if (batch == 0 || kv_heads == 0 || queries == 0) return 0;
  Plan plan;
  const int rows = group * queries;
  if (plan_on(device, batch, kv_heads, rows, keys, prefix, shared_prefix != 0, &plan) != cudaSuccess) return -1;
  return workspace_bytes(plan, rows, head_dim);
}

// strides: of q, k, v, prefix_k, prefix_v and out, each of the batch, the heads and the tokens; the prefix's of the batch
// is 0 where it is shared. first and last are null, or (batch, queries).
PE_API int pe_prefix_attention_decode(const void* q, const void* k, const void* v, const void* prefix_k,
                                      const void* prefix_v, const int64_t* strides, int batch, int kv_heads, int group,
                                      int queries, int keys, int prefix, int head_dim, int shared_prefix,
                                      const int* first, const int* last, int causal, float scale, int dtype,
                                      int prefix_dtype, void* out, float* lse, void* workspace, int device,
                                      void* stream) {
  if (!in_range(batch, kv_heads, group, queries, keys, prefix, head_dim)) return cudaErrorInvalidValue;
  if (dtype != pe::kFloat32 && dtype != pe::kFloat16 && dtype != pe::kBfloat16) return cudaErrorInvalidValue;
  if (prefix_dtype != pe::kFloat32 && prefix_dtype != dtype) return cudaErrorInvalidValue;
  if ((first == nullptr) != (last == nullptr)) return cudaErrorInvalidValue;
  if (batch == 0 || kv_heads == 0 || queries == 0) return cudaSuccess;
  const pe::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  const int bytes = dtype == pe::kFloat32 ? 4 : 2, prefix_bytes = prefix_dtype == pe::kFloat32 ? 4 : 2;
  const bool wide = prefix_bytes != bytes;
  Call call{};
  call.q = q, call.q_batch = strides[0], call.q_head = strides[1], call.q_query = strides[2];
  call.k = keys_at(k, strides + 3, bytes, false, head_dim);
  call.v = keys_at(v, strides + 6, bytes, false, head_dim);
  call.prefix_k = keys_at(prefix_k, strides + 9, prefix_bytes, wide, head_dim);
  call.prefix_v = keys_at(prefix_v, strides + 12, prefix_bytes, wide, head_dim);
  call.first = first, call.last = last, call.causal = causal != 0, call.scale = scale;
  call.batch = batch, call.kv_heads = kv_heads, call.group = group, call.queries = queries;
  call.keys = keys, call.prefix = prefix, call.head_dim = head_dim;
  call.out = out, call.out_batch = strides[15], call.out_head = strides[16], call.out_query = strides[17];
  call.lse = lse;
  const cudaError_t error =
      plan_on(device, batch, kv_heads, group * queries, keys, prefix, shared_prefix != 0, &call.plan);
  if (error != cudaSuccess) return error;
  place_in_workspace(call, workspace);
  if (dtype == pe::kFloat32) return launch_for_width<float>(call, (cudaStream_t)stream);
  if (dtype == pe::kFloat16) return launch_for_width<__half>(call, (cudaStream_t)stream);
  return launch_for_width<__nv_bfloat16>(call, (cudaStream_t)stream);
}
