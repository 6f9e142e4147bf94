// Rotary position embedding on CPU; the maths is in peft_engine/ops/rotary.py.
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

struct Heads {
  const void* in;
  void* out;
  int64_t heads, stride_b, stride_h, stride_t;  // of `in`; `out` is (B, T, heads, D), contiguous
};

// cos and sin are (B or 1, T, rotated), contiguous.
struct Angles {
  const void *cos, *sin;
  int64_t batch_stride;
};

}  // namespace pe

#define PE_KERNELS "cpu/rotary.inl"
#include "cpu/foreach_isa.h"

namespace {

using torch::stable::Tensor;

// q (B, T, Hq, D) and k (B, T, Hk, D) with stride 1 along D and any others; out contiguous.
std::tuple<Tensor, Tensor> rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) {
  pe::require(q.dim() == 4 && k.dim() == 4 && cos.dim() == 3 && sin.dim() == 3,
              "q, k (B, T, H, D), cos, sin (B, T, R)");
  const int64_t batch = q.size(0), tokens = q.size(1), head_dim = q.size(3), rotated = cos.size(2);
  pe::require(k.size(0) == batch && k.size(1) == tokens && k.size(3) == head_dim, "q and k that differ in heads only");
  pe::require(pe::is_dense(q, 3) && pe::is_dense(k, 3), "q and k of stride 1 along D");
  for (const Tensor* angle : {&cos, &sin})
    pe::require((angle->size(0) == 1 || angle->size(0) == batch) && angle->size(0) == cos.size(0) &&
                    angle->size(1) == tokens && angle->size(2) == rotated && angle->is_contiguous(),
                "cos and sin (B or 1, T, R), contiguous");
  pe::require(rotated % 2 == 0 && rotated <= head_dim, "an even R up to D");
  for (const Tensor* other : {&k, &cos, &sin})
    pe::require(pe::type_of(*other) == pe::type_of(q), "q, k, cos and sin of one dtype");
  Tensor q_out = pe::like(q, {batch, tokens, q.size(2), head_dim}),
         k_out = pe::like(k, {batch, tokens, k.size(2), head_dim});
  const pe::Type type = pe::type_of(q);
  const pe::Angles angles{pe::values_of(cos), pe::values_of(sin), cos.size(0) == 1 ? 0 : tokens * rotated};
  const pe::Heads qs{pe::values_of(q), q_out.mutable_data_ptr(), q.size(2), q.stride(0), q.stride(2), q.stride(1)};
  const pe::Heads ks{pe::values_of(k), k_out.mutable_data_ptr(), k.size(2), k.stride(0), k.stride(2), k.stride(1)};
  pe::for_rows(batch * tokens, (qs.heads + ks.heads) * head_dim, [&](int64_t first, int64_t last) {
    PE_CALL(rotary_tokens)(qs, angles, type, tokens, head_dim, rotated, transposed, first, last);
    PE_CALL(rotary_tokens)(ks, angles, type, tokens, head_dim, rotated, transposed, first, last);
  });
  return {q_out, k_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) { m.impl("rotary", TORCH_BOX(&rotary)); }
