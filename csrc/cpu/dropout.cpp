// Dropout on CPU; the maths is in peft_engine/ops/dropout.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/rows.h"

namespace pe {
// A call's dropout_p, threshold (round(p 2^32)) and seed.
struct DropoutArgs {
  double dropout_p = 0.0;
  uint32_t threshold = 0;
  uint64_t seed = 0;
};
}  // namespace pe

#define PE_KERNELS "cpu/dropout.inl"
#include "cpu/foreach_isa.h"

namespace {

using torch::stable::Tensor;

// x (rows, n), contiguous.
Tensor dropout(Tensor x, double p, Tensor seed) {
  pe::require(x.dim() == 2 && x.is_contiguous(), "a contiguous x (rows, columns)");
  const int64_t rows = x.size(0), n = x.size(1);
  Tensor y = pe::like(x, {rows, n});
  pe::DropoutArgs arguments;
  pe::set_dropout(arguments, p, seed);
  const void* from = pe::values_of(x);
  void* to = y.mutable_data_ptr();
  const pe::Type type = pe::type_of(x);
  pe::for_rows(rows, n,
               [&](int64_t first, int64_t last) { PE_CALL(dropout_rows)(from, to, type, n, arguments, first, last); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }
