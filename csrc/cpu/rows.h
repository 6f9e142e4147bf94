// What the row-wise ops share: the storage type of a tensor, and a parallel loop over rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/tensors.h"

namespace pe {

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
