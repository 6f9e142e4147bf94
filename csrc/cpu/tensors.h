// From torch's tensors to the plain structs that the kernels take.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <bit>
#include <cmath>
#include <initializer_list>
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

// Where a tensor's values lie. FSDP frees a weight's memory between its uses, and the tensor stays.
inline const void* values_of(const Tensor& t) {
  const void* values = t.const_data_ptr();
  STD_TORCH_CHECK(
      values || t.numel() == 0, "peft_engine: the memory of a tensor of ", t.numel(),
      " elements was freed. Under fully_shard a weight is there while its module runs, forward or backward: "
      "run whole modules");
  return values;
}

// A new contiguous tensor on the CPU. torch::stable::new_empty goes through the dispatcher and takes three times as long.
inline Tensor empty(const int64_t* sizes, int64_t dims, torch::headeronly::ScalarType dtype) {
  int64_t strides[16], stride = 1;
  STD_TORCH_CHECK(dims <= 16, "peft_engine: expected at most 16 dimensions, got ", dims);
  for (int64_t d = dims; d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, static_cast<int32_t>(dtype),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

// The same with x's dtype.
inline Tensor like(const Tensor& x, std::initializer_list<int64_t> sizes) { return empty(sizes, x.scalar_type()); }

// And its shape.
inline Tensor shaped_as(const Tensor& x) {
  const auto sizes = x.sizes();
  return empty(sizes.data(), x.dim(), x.scalar_type());
}

// What keeps a kernel from reading beyond a tensor, whoever calls the raw op. Python says the same in more words.
inline void require(bool holds, const char* what) { STD_TORCH_CHECK(holds, "peft_engine: expected ", what); }

// Whether a dimension's values lie side by side, as far as there are any.
inline bool is_dense(const Tensor& t, int64_t dim) { return t.stride(dim) == 1 || t.size(dim) < 2 || t.numel() == 0; }

inline void require_sizes(const Tensor& t, std::initializer_list<int64_t> sizes, const char* what) {
  bool fits = t.dim() == static_cast<int64_t>(sizes.size()) && t.is_contiguous();
  for (int64_t d = 0; fits && d < t.dim(); ++d) fits = t.size(d) == sizes.begin()[d];
  require(fits, what);
}

inline void require_values(const Tensor& t, int64_t count, torch::headeronly::ScalarType dtype, const char* what) {
  require(t.scalar_type() == dtype && t.numel() >= count && t.is_contiguous(), what);
}

// The weight of a call: NF4 when there is an absmax, else dense.
inline Matrix matrix_of(const Tensor& weight, const std::optional<Tensor>& absmax,
                        const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& offset,
                        int64_t blocksize, int64_t rows, int64_t cols) {
  Matrix w;
  w.data = values_of(weight);
  w.rows = rows;
  w.cols = cols;
  if (!absmax) {
    w.type = type_of(weight);
    require_sizes(weight, {rows, cols}, "a contiguous weight (out_features, in_features)");
    return w;
  }
  using torch::headeronly::ScalarType;
  require(blocksize > 0 && std::has_single_bit(static_cast<uint64_t>(blocksize)), "a power of two as blocksize");
  const int64_t blocks = (rows * cols + blocksize - 1) / blocksize;
  require_values(weight, (rows * cols + 1) / 2, ScalarType::Byte, "packed bytes, contiguous, two weights in each");
  require_values(*absmax, blocks, nested_absmax ? ScalarType::Byte : ScalarType::Float,
                 "an absmax for each block, contiguous: uint8 beside nested_absmax, else float32");
  w.type = Type::nf4;
  w.block_shift = std::countr_zero(static_cast<uint64_t>(blocksize));
  if (nested_absmax) {
    require_values(*nested_absmax, (blocks + 255) / 256, ScalarType::Float, "a nested_absmax for 256 blocks, float32");
    require(offset.has_value(), "an offset beside nested_absmax");
    require_values(*offset, 1, ScalarType::Float, "an offset of one float32");
    w.absmax_index = static_cast<const uint8_t*>(values_of(*absmax));
    w.nested_absmax = static_cast<const float*>(values_of(*nested_absmax));
    w.offset = *static_cast<const float*>(values_of(*offset));
  } else {
    w.absmax = static_cast<const float*>(values_of(*absmax));
  }
  return w;
}

// The dropout of a call's arguments; the seed is read where there is any.
template <class Arguments>
inline void set_dropout(Arguments& out, double p, const std::optional<Tensor>& seed) {
  if (p <= 0.0) return;
  require(p < 1.0 && seed.has_value(), "dropout_p below 1, and a seed");
  require_values(*seed, 1, torch::headeronly::ScalarType::Long, "a seed of one int64");
  out.dropout_p = p;
  out.threshold = static_cast<uint32_t>(std::llrint(p * 4294967296.0));
  out.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(values_of(*seed)));
}

}  // namespace pe
