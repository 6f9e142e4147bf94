// SwiGLU and GEGLU forward and backward on CPU; the maths is in peft_engine/ops/swiglu.py. gate and up are (..., n) and
// contiguous, or (rows, n) with stride 1 along n and any stride between rows.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/rows.h"

namespace pe {
enum class Gate : int { silu, gelu_tanh, gelu };  // in the order of ACTIVATIONS in peft_engine/ops/swiglu.py
}

#define PE_KERNELS "cpu/swiglu.inl"
#include "cpu/foreach_isa.h"

namespace {

using torch::stable::Tensor;

pe::Gate gate_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number < 3, "swiglu: activation must be 0 to 2, got ", number);
  return static_cast<pe::Gate>(number);
}

// gate and up as rows.
struct Pair {
  int64_t rows, n, gate_stride, up_stride;

  Pair(const Tensor& gate, const Tensor& up) {
    const int64_t dims = gate.dim();
    pe::require(dims > 0 && up.dim() == dims && pe::type_of(gate) == pe::type_of(up),
                "gate and up of one shape and dtype");
    for (int64_t d = 0; d < dims; ++d) pe::require(gate.size(d) == up.size(d), "gate and up of one shape and dtype");
    n = gate_stride = up_stride = gate.size(dims - 1);
    rows = n > 0 ? gate.numel() / n : 0;
    if (gate.is_contiguous() && up.is_contiguous()) return;
    pe::require(dims == 2 && pe::is_dense(gate, 1) && pe::is_dense(up, 1),
                "gate and up contiguous, or (rows, n) of stride 1");
    gate_stride = gate.stride(0);
    up_stride = up.stride(0);
  }
};

Tensor swiglu_forward(Tensor gate, Tensor up, int64_t activation) {
  const Pair pair(gate, up);
  Tensor y = pe::shaped_as(gate);
  const void *pg = pe::values_of(gate), *pu = pe::values_of(up);
  void* py = y.mutable_data_ptr();
  const pe::Type type = pe::type_of(gate);
  const auto which = gate_of(activation);
  pe::for_rows(pair.rows, pair.n, [&](int64_t first, int64_t last) {
    PE_CALL(swiglu_rows)(pg, pu, py, type, which, pair.n, pair.gate_stride, pair.up_stride, first, last);
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor dy, Tensor gate, Tensor up, int64_t activation) {
  const Pair pair(gate, up);
  pe::require(dy.numel() == gate.numel() && dy.is_contiguous() && pe::type_of(dy) == pe::type_of(gate),
              "a contiguous dy as gate");
  Tensor dgate = pe::shaped_as(gate), dup = pe::shaped_as(up);
  const void *pd = pe::values_of(dy), *pg = pe::values_of(gate), *pu = pe::values_of(up);
  void *og = dgate.mutable_data_ptr(), *ou = dup.mutable_data_ptr();
  const pe::Type type = pe::type_of(gate);
  const auto which = gate_of(activation);
  pe::for_rows(pair.rows, pair.n, [&](int64_t first, int64_t last) {
    PE_CALL(swiglu_backward_rows)
    (pd, pg, pu, og, ou, type, which, pair.n, pair.gate_stride, pair.up_stride, first, last);
  });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("swiglu_forward", TORCH_BOX(&swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}
