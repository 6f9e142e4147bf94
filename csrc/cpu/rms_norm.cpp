// RMSNorm forward and backward on CPU; the maths is in peft_engine/ops/rms_norm.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/rows.h"

#define PE_KERNELS "cpu/rms_norm.inl"
#include "cpu/foreach_isa.h"

namespace {

using torch::stable::Tensor;

// rstd is float32 whatever the dtype of x.
Tensor floats(int64_t n) { return pe::empty({n}, torch::headeronly::ScalarType::Float); }

// The number of columns of x, for which weight has a value each.
int64_t columns_of(const Tensor& x, const Tensor& weight) {
  pe::require(x.dim() > 0 && x.is_contiguous(), "a contiguous x (..., features)");
  const int64_t n = x.size(x.dim() - 1);
  pe::require_sizes(weight, {n}, "a contiguous weight (features,)");
  const pe::Type type = pe::type_of(weight);
  pe::require(type == pe::Type::f32 || type == pe::type_of(x), "a weight of x's dtype or float32");
  return n;
}

std::tuple<Tensor, Tensor> rms_norm_forward(Tensor x, Tensor weight, double eps, double offset) {
  const int64_t n = columns_of(x, weight), rows = n > 0 ? x.numel() / n : 0;
  Tensor y = pe::shaped_as(x), rstd = floats(rows);
  const void *px = pe::values_of(x), *pw = pe::values_of(weight);
  void* py = y.mutable_data_ptr();
  float* pr = static_cast<float*>(rstd.mutable_data_ptr());
  const pe::Type type = pe::type_of(x), weight_type = pe::type_of(weight);
  pe::for_rows(rows, n, [&](int64_t first, int64_t last) {
    PE_CALL(rms_norm_rows)
    (px, pw, py, pr, type, weight_type, static_cast<float>(offset), static_cast<float>(eps), n, first, last);
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, double offset,
                                             bool need_dx, bool need_dw) {
  const int64_t n = columns_of(x, weight), rows = n > 0 ? x.numel() / n : 0;
  pe::require(dy.numel() == x.numel() && dy.is_contiguous() && pe::type_of(dy) == pe::type_of(x),
              "a contiguous dy as x");
  pe::require_values(rstd, rows, torch::headeronly::ScalarType::Float, "rstd (rows,), float32");
  Tensor dx = need_dx ? torch::stable::empty_like(x) : pe::like(x, {0});
  Tensor dw = need_dw ? torch::stable::empty_like(weight) : pe::like(weight, {0});
  const void *pg = pe::values_of(dy), *px = pe::values_of(x), *pw = pe::values_of(weight);
  const float* pr = static_cast<const float*>(pe::values_of(rstd));
  const pe::Type type = pe::type_of(x), weight_type = pe::type_of(weight);
  if (need_dx) {
    void* out = dx.mutable_data_ptr();
    pe::for_rows(rows, n, [&](int64_t first, int64_t last) {
      PE_CALL(rms_norm_backward_rows)
      (pg, px, pw, pr, out, type, weight_type, static_cast<float>(offset), n, first, last);
    });
  }
  if (need_dw) {
    void* out = dw.mutable_data_ptr();
    const int64_t columns = PE_CALL(rms_norm_columns)();
    pe::for_rows((n + columns - 1) / columns, rows * columns, [&](int64_t first, int64_t last) {
      PE_CALL(rms_norm_weight_columns)(pg, px, pr, out, type, weight_type, rows, n, first, last);
    });
  }
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}
