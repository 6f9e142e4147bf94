// nf4.quantize and nf4.dequantize on the CPU. The maths is in peft_engine/ops/nf4.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <tuple>

#include "cpu/tensors.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PE_KERNELS "cpu/nf4.inl"
#include "cpu/foreach_isa.h"

namespace pe {
namespace {

// Values a thread takes at least: below that a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 15;

// Outputs beyond the last-level share of a core are written past the cache.
constexpr int64_t kStreamBytes = 4 << 20;

std::tuple<Tensor, Tensor> quantize_op(const Tensor& weight, int64_t blocksize) {
  require(weight.is_contiguous(), "a contiguous weight");
  require(blocksize > 0 && blocksize % 2 == 0, "an even blocksize");
  const int64_t n = weight.numel(), blocks = (n + blocksize - 1) / blocksize;
  Tensor packed = torch::stable::new_empty(weight, {(n + 1) / 2, 1}, torch::headeronly::ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(weight, {blocks}, torch::headeronly::ScalarType::Float);
  const Type type = type_of(weight);
  const void* from = pe::values_of(weight);
  uint8_t* bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  float* scales = static_cast<float*>(absmax.mutable_data_ptr());
  torch::stable::parallel_for(0, blocks, kGrain / blocksize, [&](int64_t begin, int64_t end) {
    PE_CALL(quantize)(from, type, n, static_cast<int>(blocksize), begin, end, bytes, scales);
  });
  return {packed, absmax};
}

void dequantize_op(const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
                   std::optional<Tensor> offset, int64_t blocksize, Tensor out) {
  require(out.is_contiguous(), "a contiguous out");
  const int64_t n = out.numel();
  const Matrix w = matrix_of(packed, absmax, nested_absmax, offset, blocksize, 1, n);
  const Type type = type_of(out);
  void* to = out.mutable_data_ptr();
  const bool stream = n * 2 >= kStreamBytes && reinterpret_cast<uintptr_t>(to) % 64 == 0;
  torch::stable::parallel_for(0, (n + 63) / 64, kGrain / 64, [&](int64_t begin, int64_t end) {
    PE_CALL(dequantize)(w, type, begin * 64, std::min(end * 64, n), to, stream);
  });
}

}  // namespace
}  // namespace pe

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("nf4_quantize", TORCH_BOX(&pe::quantize_op));
  m.impl("nf4_dequantize", TORCH_BOX(&pe::dequantize_op));
}
