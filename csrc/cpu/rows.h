// What the row-wise ops share: the storage type of a tensor, and a parallel loop over rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "nf4.h"

namespace pe {

inline Type type_of(const torch::stable::Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Type::f32;
    case torch::headeronly::ScalarType::BFloat16:
      return Type::bf16;
    default:
      return Type::f16;
  }
}

// A tensor of x's dtype and device; new_empty costs a dispatcher call and no more.
inline torch::stable::Tensor like(const torch::stable::Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes));
}

// body(first, last) over n rows of `width` elements; a piece is at least 32K elements, so that one row does not wait
// for a second thread.
template <class Body>
inline void for_rows(int64_t n, int64_t width, const Body& body) {
  const int64_t grain = 32768 / (width > 0 ? width : 1) + 1;
  if (n <= grain) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, body);
}

}  // namespace pe
