// The step from lora_linear's product y0 to y = (m / n) y0 + bias of DoRA, and its gradients, on CPU; the maths is in
// peft_engine/ops/dora_linear.py. y0 is (..., N), contiguous; m, n and bias are N floats.
#include <torch/csrc/stable/library.h>

#include <algorithm>
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

const float* floats(const Tensor& t) { return static_cast<const float*>(pe::values_of(t)); }

// m / n; a row of zeros, which has no direction, stays one.
std::vector<float> factors(const Tensor& magnitude, const Tensor& norm) {
  const float *m = floats(magnitude), *n = floats(norm);
  std::vector<float> out(magnitude.numel());
  for (size_t i = 0; i < out.size(); ++i) out[i] = m[i] / std::fmax(n[i], FLT_MIN);
  return out;
}

constexpr int64_t kShare = 64;  // rows

Tensor dora_linear_forward(Tensor y, Tensor magnitude, Tensor norm, std::optional<Tensor> bias) {
  const int64_t n = y.size(y.dim() - 1), rows = n > 0 ? y.numel() / n : 0;
  Tensor out = torch::stable::empty_like(y);
  const std::vector<float> factor = factors(magnitude, norm);
  const void* py = pe::values_of(y);
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
  const void *pg = pe::values_of(dy), *py = pe::values_of(y);
  void* po = dx.mutable_data_ptr();
  const pe::Type type = pe::type_of(y);
  // A share of the rows has sums of its own, which are added in order: the same bits with any number of threads.
  const int64_t shares = (rows + kShare - 1) / kShare;
  std::vector<float> sums(need_dm ? shares * n : 0);
  pe::for_rows(shares, kShare * n, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) PE_CALL(dora_linear_backward_rows)
    (pg, py, factor.data(), po, need_dm ? sums.data() + s * n : nullptr, type, n, s * kShare,
     std::min(rows, (s + 1) * kShare));
  });
  for (int64_t i = 0; need_dm && i < n; ++i) {
    double total = 0.0;
    for (int64_t s = 0; s < shares; ++s) total += sums[s * n + i];
    static_cast<float*>(dm.mutable_data_ptr())[i] = static_cast<float>(total / std::fmax(floats(norm)[i], FLT_MIN));
  }
  return {dx, dm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("dora_linear_forward", TORCH_BOX(&dora_linear_forward));
  m.impl("dora_linear_backward", TORCH_BOX(&dora_linear_backward));
}
