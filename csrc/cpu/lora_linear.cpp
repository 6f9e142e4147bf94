// lora_linear on the CPU: y = x W^T + b + s (x A^T) B^T and its gradients. The maths is in peft_engine/ops/lora_linear.py.
#include "cpu/lora_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "cpu/scratch.h"
#include "cpu/tensors.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PE_KERNELS "cpu/lora_linear.inl"
#include "cpu/foreach_isa.h"

namespace pe {
namespace {

// Tiles of 16 rows in a weight's panel. A panel's block is 16 KiB a tile and its sums are up to 32 KiB a tile: 16 tiles
// fill 3/8 of 2 MiB of L2, 8 of 1 MiB.
int64_t most_tiles() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t tiles = sysconf(_SC_LEVEL2_CACHE_SIZE) >= (2 << 20) ? 16 : 8;
  return tiles;
#else
  return 8;
#endif
}

Adapter adapter_of(const std::optional<Tensor>& a, const std::optional<Tensor>& b, const Matrix& w, Type type,
                   double scaling, double p, const std::optional<Tensor>& seed) {
  Adapter out;
  require(a.has_value() == b.has_value(), "both lora_a and lora_b, or neither");
  if (!a) return out;
  out.type = type_of(*a);
  out.rank = a->dim() > 0 ? a->size(0) : 0;
  require_sizes(*a, {out.rank, w.cols}, "a contiguous lora_a (r, in_features)");
  require_sizes(*b, {w.rows, out.rank}, "a contiguous lora_b (out_features, r)");
  require(type_of(*b) == out.type && (out.type == type || out.type == Type::f32),
          "lora_a and lora_b of x's dtype or float32");
  out.a = pe::values_of(*a);
  out.b = pe::values_of(*b);
  out.scaling = static_cast<float>(scaling);
  set_dropout(out, p, seed);
  return out;
}

std::tuple<Tensor, Tensor> forward_op(const Tensor& x, const Tensor& weight, std::optional<Tensor> absmax,
                                      std::optional<Tensor> nested_absmax, std::optional<Tensor> offset,
                                      int64_t blocksize, int64_t out_features, std::optional<Tensor> lora_a,
                                      std::optional<Tensor> lora_b, double scaling, std::optional<Tensor> bias,
                                      double dropout_p, std::optional<Tensor> seed) {
  require(x.dim() > 0 && x.is_contiguous() && out_features >= 0, "a contiguous x (..., in_features)");
  const int64_t k = x.size(x.dim() - 1);
  require(k > 0, "at least one of in_features");
  LoraLinearForward f{};
  f.rows = 1;
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    shape.push_back(x.size(d));
    f.rows *= x.size(d);
  }
  shape.push_back(out_features);
  f.x = pe::values_of(x);
  f.type = type_of(x);
  f.w = matrix_of(weight, absmax, nested_absmax, offset, blocksize, out_features, k);
  require(f.w.type == Type::nf4 || f.w.type == f.type, "a weight of x's dtype");
  f.adapter = adapter_of(lora_a, lora_b, f.w, f.type, scaling, dropout_p, seed);
  if (bias) {
    require_sizes(*bias, {out_features}, "a contiguous bias (out_features,)");
    f.bias = pe::values_of(*bias);
    f.bias_type = type_of(*bias);
  }
  Tensor y = empty(shape.data(), static_cast<int64_t>(shape.size()), x.scalar_type());
  Tensor h = empty({f.adapter.rank > 0 ? f.rows : 0, f.adapter.rank}, torch::headeronly::ScalarType::Float);
  f.y = y.mutable_data_ptr();
  f.h = static_cast<float*>(h.mutable_data_ptr());
  if (f.rows > 0 && out_features > 0) PE_CALL(lora_linear_forward)(f, torch::stable::get_num_threads(), most_tiles());
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                               std::optional<Tensor> absmax, std::optional<Tensor> nested_absmax,
                                               std::optional<Tensor> offset, int64_t blocksize,
                                               std::optional<Tensor> lora_a, std::optional<Tensor> lora_b,
                                               std::optional<Tensor> h, double scaling, double dropout_p,
                                               std::optional<Tensor> seed, bool need_dx, bool need_da) {
  require(dy.dim() > 0 && dy.dim() == x.dim() && dy.is_contiguous(), "a contiguous dy (..., out_features) for x");
  const int64_t k = x.size(x.dim() - 1), n = dy.size(dy.dim() - 1);
  LoraLinearBackward f{};
  f.rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) f.rows *= x.size(d);
  require(dy.numel() == f.rows * n, "as many rows of dy as of x");
  f.dy = pe::values_of(dy);
  f.x = pe::values_of(x);
  f.type = type_of(dy);
  f.w = matrix_of(weight, absmax, nested_absmax, offset, blocksize, n, k);
  require(f.w.type == Type::nf4 || f.w.type == f.type, "a weight of dy's dtype");
  f.adapter = adapter_of(lora_a, lora_b, f.w, f.type, scaling, dropout_p, seed);
  require(!lora_a || !need_da || (x.is_contiguous() && type_of(x) == f.type), "a contiguous x of dy's dtype");
  std::vector<int64_t> shape;
  for (int64_t d = 0; need_dx && d < x.dim(); ++d) shape.push_back(x.size(d));
  if (!need_dx) shape.push_back(0);
  Tensor dx = empty(shape.data(), static_cast<int64_t>(shape.size()), dy.scalar_type());
  Tensor da = lora_a ? torch::stable::empty_like(*lora_a) : like(dy, {0});
  Tensor db = lora_b ? torch::stable::empty_like(*lora_b) : like(dy, {0});
  if (need_dx) f.dx = dx.mutable_data_ptr();
  if (lora_a && need_da) f.da = da.mutable_data_ptr();
  if (lora_b && h) {
    require_values(*h, f.rows * f.adapter.rank, torch::headeronly::ScalarType::Float, "h (rows, r), float32");
    f.h = static_cast<const float*>(pe::values_of(*h));
    f.db = db.mutable_data_ptr();
  }
  PE_CALL(lora_linear_backward)(f, torch::stable::get_num_threads(), most_tiles());
  return {dx, da, db};
}

}  // namespace
}  // namespace pe

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("lora_linear_forward", TORCH_BOX(&pe::forward_op));
  m.impl("lora_linear_backward", TORCH_BOX(&pe::backward_op));
}
