// SwiGLU and GEGLU forward and backward on CPU; the maths is in peft_engine/ops/swiglu.py. gate and up are (rows, n) with
// stride 1 along n and any stride between rows.
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

Tensor swiglu_forward(Tensor gate, Tensor up, int64_t activation) {
  const int64_t rows = gate.size(0), n = gate.size(1), gate_stride = gate.stride(0), up_stride = up.stride(0);
  Tensor y = pe::like(gate, {rows, n});
  const void *pg = pe::values_of(gate), *pu = pe::values_of(up);
  void* py = y.mutable_data_ptr();
  const pe::Type type = pe::type_of(gate);
  const auto which = gate_of(activation);
  pe::for_rows(rows, n, [&](int64_t first, int64_t last) {
    PE_CALL(swiglu_rows)(pg, pu, py, type, which, n, gate_stride, up_stride, first, last);
  });
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor dy, Tensor gate, Tensor up, int64_t activation) {
  const int64_t rows = gate.size(0), n = gate.size(1), gate_stride = gate.stride(0), up_stride = up.stride(0);
  Tensor dgate = pe::like(gate, {rows, n}), dup = pe::like(up, {rows, n});
  const void *pd = pe::values_of(dy), *pg = pe::values_of(gate), *pu = pe::values_of(up);
  void *og = dgate.mutable_data_ptr(), *ou = dup.mutable_data_ptr();
  const pe::Type type = pe::type_of(gate);
  const auto which = gate_of(activation);
  pe::for_rows(rows, n, [&](int64_t first, int64_t last) {
    PE_CALL(swiglu_backward_rows)(pd, pg, pu, og, ou, type, which, n, gate_stride, up_stride, first, last);
  });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("swiglu_forward", TORCH_BOX(&swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}
