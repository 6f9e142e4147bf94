// bottleneck on the CPU: y = residual + s (act(LN(x) Wd^T + bd) Wu^T + bu) and its gradients. The maths is in
// peft_engine/ops/bottleneck.py.
#include "cpu/bottleneck.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/tensors.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PE_KERNELS "cpu/bottleneck.inl"
#include "cpu/foreach_isa.h"

namespace pe {
namespace {

using Maybe = std::optional<Tensor>;

const void* data_of(const Maybe& t) { return t ? pe::values_of(*t) : nullptr; }

// A number, since torch's stable ABI leaks the strings that it hands over (peft_engine/ops/swiglu.py).
Activation activation_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number < 4, "bottleneck: activation must be 0 to 3, got ", number);
  return static_cast<Activation>(number);
}

BottleneckAdapter adapter_of(const Tensor& down, const Maybe& down_bias, const Tensor& up, const Maybe& up_bias,
                             const Maybe& norm, const Maybe& norm_bias, int64_t activation, double scaling) {
  BottleneckAdapter a{};
  require(down.dim() == 2 && down.size(1) > 0, "weights (width, features) and (features, width)");
  const int64_t width = down.size(0), features = down.size(1);
  const auto fits = [](const Tensor& t, std::initializer_list<int64_t> sizes, const Tensor& like, const char* what) {
    require_sizes(t, sizes, what);
    require(t.scalar_type() == like.scalar_type(), what);
  };
  fits(down, {width, features}, down, "a contiguous down (width, features)");
  fits(up, {features, width}, down, "a contiguous up (features, width) of down's dtype");
  if (down_bias) fits(*down_bias, {width}, down, "a bias (width,) of the weights' dtype");
  if (up_bias) fits(*up_bias, {features}, down, "a bias (features,) of the weights' dtype");
  if (norm) fits(*norm, {features}, *norm, "a norm (features,)");
  if (norm_bias) fits(*norm_bias, {features}, norm ? *norm : down, "a norm's bias (features,) of its dtype");
  require(norm || !norm_bias, "a norm beside its bias");
  a.down = pe::values_of(down);
  a.down_bias = data_of(down_bias);
  a.up = pe::values_of(up);
  a.up_bias = data_of(up_bias);
  a.type = type_of(down);
  a.norm = data_of(norm);
  a.norm_bias = data_of(norm_bias);
  a.norm_type = norm ? type_of(*norm) : Type::f32;
  a.features = down.size(1);
  a.width = down.size(0);
  a.activation = activation_of(activation);
  a.scaling = static_cast<float>(scaling);
  return a;
}

std::tuple<Tensor, Tensor, Tensor> forward_op(const Tensor& x, Maybe residual, const Tensor& down, Maybe down_bias,
                                              const Tensor& up, Maybe up_bias, Maybe norm, Maybe norm_bias,
                                              int64_t activation, double scaling, double eps) {
  BottleneckForward f{};
  f.adapter = adapter_of(down, down_bias, up, up_bias, norm, norm_bias, activation, scaling);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(x.size(d));
  f.rows = x.numel() / f.adapter.features;
  require(x.dim() > 0 && x.size(x.dim() - 1) == f.adapter.features && x.is_contiguous(),
          "a contiguous x (..., features)");
  require(
      !residual || (residual->numel() == x.numel() && residual->is_contiguous() && type_of(*residual) == type_of(x)),
      "a contiguous residual as x");
  f.x = pe::values_of(x);
  f.residual = residual ? pe::values_of(*residual) : f.x;
  f.type = type_of(x);
  f.eps = static_cast<float>(eps);
  Tensor y = empty(shape.data(), x.dim(), x.scalar_type()), middle = like(down, {f.rows, f.adapter.width});
  Tensor stats = empty({norm ? f.rows : 0, 2}, torch::headeronly::ScalarType::Float);
  f.y = y.mutable_data_ptr();
  f.middle = middle.mutable_data_ptr();
  f.stats = static_cast<float*>(stats.mutable_data_ptr());
  if (f.rows > 0) PE_CALL(bottleneck_forward)(f, torch::stable::get_num_threads());
  return {y, middle, stats};
}

// A gradient of `source`'s shape, or one with no elements; `data` is set where it is wanted.
Tensor gradient(bool wanted, const Tensor* source, const Tensor& dy, void** data) {
  if (!wanted || source == nullptr) return like(dy, {0});
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < source->dim(); ++d) shape.push_back(source->size(d));
  Tensor out = empty(shape.data(), source->dim(), source->scalar_type());
  *data = out.mutable_data_ptr();
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward_op(const Tensor& dy, const Tensor& x, const Tensor& middle, const Tensor& stats, const Tensor& down,
                      Maybe down_bias, const Tensor& up, Maybe up_bias, Maybe norm, Maybe norm_bias, int64_t activation,
                      double scaling, bool residual_is_x, std::vector<bool> wanted) {
  STD_TORCH_CHECK(wanted.size() == 7, "bottleneck_backward: wanted must have 7 entries, got ", wanted.size());
  BottleneckBackward f{};
  f.adapter = adapter_of(down, down_bias, up, up_bias, norm, norm_bias, activation, scaling);
  f.rows = dy.dim() == 2 ? dy.size(0) : 0;
  const int64_t features = f.adapter.features, width = f.adapter.width;
  require(dy.dim() == 2 && dy.size(1) == features && dy.is_contiguous(), "a contiguous dy (rows, features)");
  const bool reads_x = wanted[1] || norm;
  require(!reads_x || (x.numel() == dy.numel() && x.is_contiguous() && type_of(x) == type_of(dy)),
          "a contiguous x as dy");
  require(middle.numel() == f.rows * width && middle.is_contiguous() && type_of(middle) == f.adapter.type,
          "a contiguous middle (rows, width) of the weights' dtype");
  require_values(stats, norm ? 2 * f.rows : 0, torch::headeronly::ScalarType::Float, "stats (rows, 2), float32");
  f.dy = pe::values_of(dy);
  f.x = pe::values_of(x);
  f.middle = pe::values_of(middle);
  f.stats = static_cast<const float*>(pe::values_of(stats));
  f.type = type_of(dy);
  f.residual_is_x = residual_is_x;
  const auto maybe = [](const Maybe& t) { return t ? &*t : nullptr; };
  Tensor dx = gradient(wanted[0], &dy, dy, &f.dx), ddown = gradient(wanted[1], &down, dy, &f.ddown);
  Tensor ddown_bias = gradient(wanted[2], maybe(down_bias), dy, &f.ddown_bias);
  Tensor dup = gradient(wanted[3], &up, dy, &f.dup), dup_bias = gradient(wanted[4], maybe(up_bias), dy, &f.dup_bias);
  Tensor dnorm = gradient(wanted[5], maybe(norm), dy, &f.dnorm);
  Tensor dnorm_bias = gradient(wanted[6], maybe(norm_bias), dy, &f.dnorm_bias);
  PE_CALL(bottleneck_backward)(f, torch::stable::get_num_threads());
  return {dx, ddown, ddown_bias, dup, dup_bias, dnorm, dnorm_bias};
}

}  // namespace
}  // namespace pe

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("bottleneck_forward", TORCH_BOX(&pe::forward_op));
  m.impl("bottleneck_backward", TORCH_BOX(&pe::backward_op));
}
