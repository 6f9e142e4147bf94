// From torch's tensors to the plain structs that the kernels take.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <bit>
#include <optional>

#include "nf4.h"

namespace pe {

using torch::stable::Tensor;

inline Type type_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      STD_TORCH_CHECK(false, "peft_engine: expected float32, bfloat16 or float16");
  }
}

// The weight of a call: NF4 when there is an absmax, else dense.
inline Matrix matrix_of(const Tensor& weight, const std::optional<Tensor>& absmax,
                        const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& offset,
                        int64_t blocksize, int64_t rows, int64_t cols) {
  Matrix w;
  w.data = weight.const_data_ptr();
  w.rows = rows;
  w.cols = cols;
  if (!absmax) {
    w.type = type_of(weight);
    return w;
  }
  w.type = Type::nf4;
  w.block_shift = std::countr_zero(static_cast<uint64_t>(blocksize));
  if (nested_absmax) {
    w.absmax_index = static_cast<const uint8_t*>(absmax->const_data_ptr());
    w.nested_absmax = static_cast<const float*>(nested_absmax->const_data_ptr());
    w.offset = *static_cast<const float*>(offset->const_data_ptr());
  } else {
    w.absmax = static_cast<const float*>(absmax->const_data_ptr());
  }
  return w;
}

}  // namespace pe
