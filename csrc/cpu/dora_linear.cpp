// The step from lora_linear's product y0 to y = (m / n) y0 + bias of DoRA, and its gradients, on CPU; the maths is in
// peft_engine/ops/dora_linear.py. y0 is (..., N), contiguous; m, n and bias are N floats.
#include <torch/csrc/stable/library.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/rows.h"

#define PE_KERNELS "cpu/dora_linear.inl"
#include "cpu/foreach_isa.h"

namespace {

using torch::stable::Tensor;

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// m / n; a row of zeros, which has no direction, stays one.
std::vector<float> factors(const Tensor& magnitude, const Tensor& norm) {
  const float *m = floats(magnitude), *n = floats(norm);
  std::vector<float> out(magnitude.numel());
  for (size_t i = 0; i < out.size(); ++i) out[i] = m[i] / std::fmax(n[i], FLT_MIN);
  return out;
}

Tensor dora_linear_forward(Tensor y, Tensor magnitude, Tensor norm, std::optional<Tensor> bias) {
  const int64_t n = y.size(y.dim() - 1), rows = n > 0 ? y.numel() / n : 0;
  Tensor out = torch::stable::empty_like(y);
  const std::vector<float> factor = factors(magnitude, norm);
  const void* py = y.const_data_ptr();
  void* po = out.mutable_data_ptr();
  const float* pb = bias ? floats(*bias) : nullptr;
  const pe::Type type = pe::type_of(y);
  pe::for_rows(rows, n, [&](int64_t first, int64_t last) {
    PE_CALL(dora_linear_rows)(py, factor.data(), pb, po, type, n, first, last);
  });
  return out;
}

std::tuple<Tensor, Tensor> dora_linear_backward(Tensor dy, Tensor y, Tensor magnitude, Tensor norm, bool need_dm) {
  const int64_t n = y.size(y.dim() - 1), rows = n > 0 ? y.numel() / n : 0;
  Tensor dx = torch::stable::empty_like(dy);
  Tensor dm = need_dm ? torch::stable::empty_like(magnitude) : pe::like(magnitude, {0});
  const std::vector<float> factor = factors(magnitude, norm);
  const void *pg = dy.const_data_ptr(), *py = y.const_data_ptr();
  void* po = dx.mutable_data_ptr();
  float* pm = need_dm ? static_cast<float*>(dm.mutable_data_ptr()) : nullptr;
  const pe::Type type = pe::type_of(y);
  const int64_t columns = PE_CALL(dora_linear_columns)();
  pe::for_rows((n + columns - 1) / columns, (rows > 0 ? rows : 1) * columns, [&](int64_t first, int64_t last) {
    PE_CALL(dora_linear_backward_columns)(pg, py, factor.data(), floats(norm), po, pm, type, rows, n, first, last);
  });
  return {dx, dm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("dora_linear_forward", TORCH_BOX(&dora_linear_forward));
  m.impl("dora_linear_backward", TORCH_BOX(&dora_linear_backward));
}
