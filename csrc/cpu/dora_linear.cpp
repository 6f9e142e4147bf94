// The step from lora_linear's product y0 to y = (m / n) y0 + bias of DoRA, and its gradients, on CPU; the maths is in
// peft_engine/ops/dora_linear.py. y0 is (..., N), contiguous; m, n and bias are N floats.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/rows.h"
#include "cpu/scratch.h"

#define PE_KERNELS "cpu/dora_linear.inl"
#include "cpu/foreach_isa.h"

namespace {

using pe::Slot;
using torch::stable::Tensor;

const float* floats(const Tensor& t) { return static_cast<const float*>(pe::values_of(t)); }

// The columns of y, of which magnitude and norm have a value each.
int64_t columns_of(const Tensor& y, const Tensor& magnitude, const Tensor& norm) {
  pe::require(y.dim() > 0 && y.is_contiguous(), "a contiguous y (..., out_features)");
  const int64_t n = y.size(y.dim() - 1);
  for (const Tensor* t : {&magnitude, &norm})
    pe::require_values(*t, n, torch::headeronly::ScalarType::Float, "magnitude and norm (out_features,), float32");
  pe::require(magnitude.numel() == n, "a magnitude for each column of y");
  return n;
}

// m / n; a row of zeros, which has no direction, stays one.
const float* factors(const Tensor& magnitude, const Tensor& norm) {
  const int64_t count = magnitude.numel();
  const float *m = floats(magnitude), *n = floats(norm);
  // Half a page on: at the offset of large tensors in a page, a load seems to follow the store before it (15 % slower).
  float* out = pe::scratch<float>(Slot::shared, count + 512) + 512;
  for (int64_t i = 0; i < count; ++i) out[i] = m[i] / std::max(n[i], FLT_MIN);
  return out;
}

constexpr int64_t kShare = 64;    // rows
constexpr int64_t kColumns = 64;  // whose sums over the shares are formed together

Tensor dora_linear_forward(Tensor y, Tensor magnitude, Tensor norm, std::optional<Tensor> bias) {
  const int64_t n = columns_of(y, magnitude, norm), rows = n > 0 ? y.numel() / n : 0;
  if (bias) pe::require_values(*bias, n, torch::headeronly::ScalarType::Float, "a bias (out_features,), float32");
  Tensor out = torch::stable::empty_like(y);
  const float* factor = factors(magnitude, norm);
  const void* py = pe::values_of(y);
  void* po = out.mutable_data_ptr();
  const float* pb = bias ? floats(*bias) : nullptr;
  const pe::Type type = pe::type_of(y);
  pe::for_rows(rows, n, [&](int64_t first, int64_t last) {
    PE_CALL(dora_linear_rows)(py, factor, pb, po, type, n, first, last);
  });
  return out;
}

std::tuple<Tensor, Tensor> dora_linear_backward(Tensor dy, Tensor y, Tensor magnitude, Tensor norm, bool need_dm) {
  const int64_t n = columns_of(y, magnitude, norm), rows = n > 0 ? y.numel() / n : 0;
  pe::require(dy.numel() == y.numel() && dy.is_contiguous() && pe::type_of(dy) == pe::type_of(y),
              "a contiguous dy as y");
  Tensor dx = torch::stable::empty_like(dy);
  Tensor dm = need_dm ? torch::stable::empty_like(magnitude) : pe::like(magnitude, {0});
  const float* factor = factors(magnitude, norm);
  const void *pg = pe::values_of(dy), *py = pe::values_of(y);
  void* po = dx.mutable_data_ptr();
  const pe::Type type = pe::type_of(y);
  // A share of the rows has sums of its own, which are added in order: the same bits with any number of threads.
  const int64_t shares = (rows + kShare - 1) / kShare;
  float* sums = need_dm ? pe::scratch<float>(Slot::sums, shares * n) : nullptr;
  pe::for_rows(shares, kShare * n, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) PE_CALL(dora_linear_backward_rows)
    (pg, py, factor, po, need_dm ? sums + s * n : nullptr, type, n, s * kShare, std::min(rows, (s + 1) * kShare));
  });
  if (!need_dm) return {dx, dm};
  const float* pn = floats(norm);
  float* pm = static_cast<float*>(dm.mutable_data_ptr());
  pe::for_rows((n + kColumns - 1) / kColumns, kColumns * shares, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kColumns; i < std::min(n, last * kColumns); i += kColumns) {
      const int64_t count = std::min(kColumns, n - i);
      double total[kColumns] = {};
      for (int64_t s = 0; s < shares; ++s)
        for (int64_t j = 0; j < count; ++j) total[j] += sums[s * n + i + j];
      for (int64_t j = 0; j < count; ++j) pm[i + j] = static_cast<float>(total[j] / std::max(pn[i + j], FLT_MIN));
    }
  });
  return {dx, dm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("dora_linear_forward", TORCH_BOX(&dora_linear_forward));
  m.impl("dora_linear_backward", TORCH_BOX(&dora_linear_backward));
}
