// The row passes of linear_cross_entropy: peft_engine/ops/linear_cross_entropy.py calls them between the products.
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/tensors.h"

namespace pe {

// Rows of logits, or of a range of their columns.
struct Logits {
  void* data;
  Type type;
  int64_t cols, row_bytes;
  int64_t first_column;   // the vocabulary entry of column 0
  const int64_t* labels;  // one a row, each a valid entry of the vocabulary
  const float* scale;     // one a row: what the gradient is multiplied by

  char* row(int64_t r) const { return static_cast<char*>(data) + r * row_bytes; }
};

}  // namespace pe

#define PE_KERNELS "cpu/linear_cross_entropy.inl"
#include "cpu/foreach_isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

pe::Logits describe(const Tensor& logits, const Tensor& labels, const Tensor& scale, int64_t first_column) {
  const pe::Type type = pe::type_of(logits);
  pe::require(logits.dim() == 2 && pe::is_dense(logits, 1), "logits (rows, columns) of stride 1");
  pe::require_values(labels, logits.size(0), ScalarType::Long, "a label for each row, int64");
  pe::require_values(scale, logits.size(0), ScalarType::Float, "a scale for each row, float32");
  const int64_t bytes = type == pe::Type::f32 ? 4 : 2;
  return {logits.data_ptr(),
          type,
          logits.size(1),
          logits.stride(0) * bytes,
          first_column,
          static_cast<const int64_t*>(labels.data_ptr()),
          static_cast<const float*>(scale.data_ptr())};
}

// logits (rows, vocabulary), columns contiguous; labels int64 (rows,); scale float (rows,); loss float (rows,) and
// stats float (rows, 2), the maximum and the sum of exponentials, are written; logits become their gradient if asked.
void cross_entropy_rows(Tensor logits, Tensor labels, Tensor scale, Tensor loss, Tensor stats, bool write_gradient) {
  const pe::Logits l = describe(logits, labels, scale, 0);
  pe::require_values(loss, logits.size(0), ScalarType::Float, "a loss for each row, float32");
  pe::require_values(stats, 2 * logits.size(0), ScalarType::Float, "stats (rows, 2), float32");
  float* losses = static_cast<float*>(loss.data_ptr());
  float* row_stats = static_cast<float*>(stats.data_ptr());
  torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    PE_CALL(cross_entropy_loss)(l, begin, end, losses, row_stats, write_gradient);
  });
}

// The gradient in place of columns first_column .. of logits whose stats are known.
void cross_entropy_columns(Tensor logits, Tensor labels, Tensor scale, Tensor stats, int64_t first_column) {
  const pe::Logits l = describe(logits, labels, scale, first_column);
  pe::require_values(stats, 2 * logits.size(0), ScalarType::Float, "stats (rows, 2), float32");
  const float* row_stats = static_cast<const float*>(stats.data_ptr());
  torch::stable::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    PE_CALL(cross_entropy_gradient)(l, begin, end, row_stats);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows));
  m.impl("cross_entropy_columns", TORCH_BOX(&cross_entropy_columns));
}
