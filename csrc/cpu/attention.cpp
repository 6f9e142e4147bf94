// Attention over intervals of keys on CPU; the maths is in peft_engine/ops/attention.py.
//
// Queries are cut into segments that share no key (the documents of a packed row), so that a task is one segment and
// one key/value head, and owns every gradient it writes: no atomics, and the same sums whatever the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/attention.h"
#include "cpu/rows.h"

#define PE_KERNELS "cpu/attention.inl"
#include "cpu/foreach_isa.h"

namespace {

using pe::AttentionArgs;
using pe::Heads4;
using pe::Segment;
using torch::stable::Tensor;

// Queries of one task of the forward: the keys are packed again for each.
constexpr int64_t kForwardChunk = 192;

Heads4 heads4(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// The segments of every row of the batch; together they own every query and every key.
std::vector<Segment> segments(const AttentionArgs& x, int64_t batch) {
  std::vector<Segment> out;
  std::vector<int64_t> from(x.queries + 1);  // the first key that any query from i on sees
  for (int64_t b = 0; b < batch; ++b) {
    if (x.first == nullptr) {
      out.push_back({b, 0, x.queries, 0, x.keys});
      continue;
    }
    from[x.queries] = x.keys;
    for (int64_t i = x.queries - 1; i >= 0; --i)
      from[i] = x.first_key(b, i) < x.last_key(b, i) ? std::min(from[i + 1], x.first_key(b, i)) : from[i + 1];
    Segment s{b, 0, 0, 0, 0};
    for (int64_t i = 0; i < x.queries; ++i) {
      if (s.k1 > s.k0 && s.k1 <= from[i]) {
        s.q1 = i;
        out.push_back(s);
        s = {b, i, i, s.k1, s.k1};
      }
      if (x.first_key(b, i) < x.last_key(b, i)) s.k1 = std::max(s.k1, x.last_key(b, i));
    }
    s.q1 = x.queries;
    s.k1 = x.keys;
    out.push_back(s);
  }
  return out;
}

float* scratch(int64_t floats) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < floats + 16) buffer.resize(floats + 16);
  const uintptr_t at = reinterpret_cast<uintptr_t>(buffer.data());
  return reinterpret_cast<float*>((at + 63) / 64 * 64);
}

AttentionArgs arguments(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& first,
                        const std::optional<Tensor>& last, double scale) {
  AttentionArgs x{};
  x.type = pe::type_of(q);
  x.heads = q.size(1), x.kv_heads = k.size(1), x.queries = q.size(2), x.keys = k.size(2), x.head_dim = q.size(3);
  x.scale = static_cast<float>(scale);
  x.first = first ? static_cast<const int32_t*>(first->const_data_ptr()) : nullptr;
  x.last = last ? static_cast<const int32_t*>(last->const_data_ptr()) : nullptr;
  x.q = heads4(q), x.k = heads4(k), x.v = heads4(v);
  return x;
}

// (B, H, T, D) as a view of (B, T, H, D): the layout the next linear reads.
Tensor by_token(const Tensor& x) {
  Tensor out = pe::like(x, {x.size(0), x.size(2), x.size(1), x.size(3)});
  return torch::stable::transpose(out, 1, 2);
}

Tensor attention_forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> first, std::optional<Tensor> last,
                         double scale) {
  Tensor out = by_token(q);
  AttentionArgs x = arguments(q, k, v, first, last, scale);
  x.out = heads4(out);
  struct Task {
    Segment segment;
    int64_t group, q0, q1;
  };
  std::vector<Task> tasks;
  for (const Segment& s : segments(x, q.size(0)))
    for (int64_t g = 0; g < x.kv_heads; ++g)
      for (int64_t i = s.q0; i < s.q1; i += kForwardChunk)
        tasks.push_back({s, g, i, std::min(s.q1, i + kForwardChunk)});
  const int64_t width = pe::padded(x.head_dim);
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = tasks[i];
      const int64_t stride = pe::padded(t.segment.k1 - t.segment.k0);
      float* buffer = scratch(2 * stride * width + pe::kQueryBlock * (stride + 2 * width));
      PE_CALL(attention_forward_task)(x, t.segment, t.group, t.q0, t.q1, buffer);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v,
                                                      std::optional<Tensor> first, std::optional<Tensor> last,
                                                      double scale) {
  Tensor dq = by_token(q), dk = by_token(k), dv = by_token(v);
  AttentionArgs x = arguments(q, k, v, first, last, scale);
  x.dout = heads4(dout), x.dq = heads4(dq), x.dk = heads4(dk), x.dv = heads4(dv);
  const std::vector<Segment> all = segments(x, q.size(0));
  const int64_t width = pe::padded(x.head_dim);
  torch::stable::parallel_for(0, static_cast<int64_t>(all.size()) * x.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Segment& s = all[i / x.kv_heads];
      const int64_t stride = pe::padded(s.k1 - s.k0);
      float* buffer = scratch(5 * stride * width + pe::kQueryBlock * (2 * stride + 3 * width));
      PE_CALL(attention_backward_task)(x, s, i % x.kv_heads, buffer);
    }
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
