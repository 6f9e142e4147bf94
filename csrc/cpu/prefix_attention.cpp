// Attention over a prefix and real keys on CPU; the maths is in peft_engine/ops/prefix_attention.py.
//
// A task is one key/value head of one row of the batch (forward: some of its queries), and owns all that it writes. Only
// the gradient of a shared prefix is a sum over the batch: the batch is cut into chunks, by its size and not by the
// threads there are; each sums its rows one after another, and the sums are added in the chunks' order. No atomics, the
// same bits whatever the number of threads, and memory that stops growing with the batch at kSums sums.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/prefix_attention.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

#define PE_KERNELS "cpu/prefix_attention.inl"
#include "cpu/foreach_isa.h"

namespace {

using pe::Heads4;
using pe::PrefixAttentionArgs;
using pe::Segment;
using pe::Slot;
using torch::stable::Tensor;

// Rows of one task of the forward, a multiple of kRowBlock: the real keys are packed again for each.
constexpr int64_t kForwardRows = 768;
// Sums that are kept at most for the gradient of a shared prefix (or one for each key/value head).
constexpr int64_t kSums = 32;

Heads4 heads4(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// (B, H, T, D) as a view of (B, T, H, D): the layout the next linear reads.
Tensor by_token(const Tensor& x) {
  Tensor out = pe::like(x, {x.size(0), x.size(2), x.size(1), x.size(3)});
  return torch::stable::transpose(out, 1, 2);
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  for (int d = 0; d < 4; ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

PrefixAttentionArgs arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k,
                              const Tensor& prefix_v, const std::optional<Tensor>& first,
                              const std::optional<Tensor>& last, const std::optional<Tensor>& bias, bool causal,
                              double scale, double dropout_p, const std::optional<Tensor>& seed, double softcap) {
  PrefixAttentionArgs x{};
  for (const Tensor* t : {&q, &k, &v, &prefix_k, &prefix_v})
    pe::require(t->dim() == 4 && pe::is_dense(*t, 3), "q, k, v and the prefix (B, H, T, D) of stride 1 along D");
  pe::require(same_sizes(k, v) && same_sizes(prefix_k, prefix_v), "values of the keys' sizes");
  const int64_t rows = q.size(0), kv_heads = k.size(1), keys = k.size(2);
  pe::require(k.size(0) == rows && k.size(3) == q.size(3) && kv_heads > 0 && q.size(1) % kv_heads == 0,
              "keys of q's batch and head_dim, their heads a divisor of q's");
  pe::require((prefix_k.size(0) == 1 || prefix_k.size(0) == rows) && prefix_k.size(1) == kv_heads &&
                  prefix_k.size(3) == q.size(3),
              "a prefix (B or 1, heads of the keys, P, D)");
  pe::require(pe::type_of(k) == pe::type_of(q) && pe::type_of(v) == pe::type_of(q) &&
                  pe::type_of(prefix_k) == pe::type_of(prefix_v),
              "keys and values of q's dtype, and one dtype of the prefix");
  pe::require(first.has_value() == last.has_value(), "first and last, or neither");
  for (const auto* ends : {&first, &last})
    if (*ends)
      pe::require_values(**ends, rows * q.size(2), torch::headeronly::ScalarType::Int, "first and last int32 (B, T)");
  pe::require(first || !causal || q.size(2) <= keys, "as many keys as queries where it is causal");
  x.type = pe::type_of(q), x.prefix_type = pe::type_of(prefix_k);
  x.batch = q.size(0), x.heads = q.size(1), x.queries = q.size(2), x.head_dim = q.size(3);
  x.kv_heads = k.size(1), x.keys = k.size(2), x.prefix = prefix_k.size(2);
  x.shared = prefix_k.size(0) == 1;
  x.causal = causal;
  x.scale = static_cast<float>(scale), x.softcap = static_cast<float>(softcap);
  x.first = first ? static_cast<const int32_t*>(pe::values_of(*first)) : nullptr;
  x.last = last ? static_cast<const int32_t*>(pe::values_of(*last)) : nullptr;
  x.q = heads4(q), x.k = heads4(k), x.v = heads4(v), x.prefix_k = heads4(prefix_k), x.prefix_v = heads4(prefix_v);
  if (bias) {
    pe::require(bias->dim() == 4 && bias->size(3) == keys, "a bias (B, H, T, S)");
    for (int d = 0; d < 3; ++d) pe::require(bias->size(d) == 1 || bias->size(d) == q.size(d), "a bias (B, H, T, S)");
    x.bias = pe::values_of(*bias), x.bias_type = pe::type_of(*bias);
    const auto stride = [&](int d) { return bias->size(d) == 1 ? 0 : bias->stride(d); };
    x.bias_batch = stride(0), x.bias_head = stride(1), x.bias_query = stride(2), x.bias_key = bias->stride(3);
  }
  pe::set_dropout(x, dropout_p, seed);
  return x;
}

uint32_t* scratch(const PrefixAttentionArgs& x) { return pe::scratch<uint32_t>(Slot::task, pe::task_words(x)); }

// Tasks of unlike work, the dearest first: whichever thread is free takes the next. Each owns what it writes, so the bits
// do not depend on who took it.
template <class Task>
void hand_out(int64_t tasks, const Task& run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) run(task);
  });
}

// A shared prefix as operands, once a call.
void pack_shared(PrefixAttentionArgs& x, bool backward) {
  if (!x.shared || x.prefix == 0 || x.batch == 0) return;
  const int64_t words = 3 * pe::operand_words(x.prefix, x.head_dim);
  uint32_t* packed = pe::scratch<uint32_t>(Slot::shared, x.kv_heads * words);
  torch::stable::parallel_for(0, x.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) PE_CALL(prefix_attention_pack)(x, g, backward, packed, scratch(x));
  });
  x.packed = packed;
}

// The segments of every row of the batch, the largest first; together they own every query and every key.
std::vector<Segment> segments(const PrefixAttentionArgs& x) {
  std::vector<Segment> out;
  std::vector<int64_t> from(x.queries + 1);  // the first key that any query from t on sees
  for (int64_t b = 0; b < x.batch; ++b) {
    if (x.first == nullptr) {
      out.push_back({b, 0, x.queries, 0, x.keys});
      continue;
    }
    from[x.queries] = x.keys;
    for (int64_t t = x.queries - 1; t >= 0; --t)
      from[t] = x.first_key(b, t) < x.last_key(b, t) ? std::min(from[t + 1], x.first_key(b, t)) : from[t + 1];
    Segment s{b, 0, 0, 0, 0};
    for (int64_t t = 0; t < x.queries; ++t) {
      if (s.k1 > s.k0 && s.k1 <= from[t]) {
        s.q1 = t;
        out.push_back(s);
        s = {b, t, t, s.k1, s.k1};
      }
      if (x.first_key(b, t) < x.last_key(b, t)) s.k1 = std::max(s.k1, x.last_key(b, t));
    }
    s.q1 = x.queries;
    s.k1 = x.keys;
    out.push_back(s);
  }
  const auto work = [](const Segment& s) { return (s.q1 - s.q0) * (s.k1 - s.k0); };
  std::stable_sort(out.begin(), out.end(), [&](const Segment& a, const Segment& b) { return work(a) > work(b); });
  return out;
}

// Few queries: a task is a head, or, where there are too few of them for the threads, one part of its keys.
void forward_few(const PrefixAttentionArgs& x) {
  const int64_t parts = pe::part_count(x), words = pe::part_words(x), heads = x.batch * x.kv_heads;
  const bool split = heads < 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  float* shared = split ? pe::scratch<float>(Slot::shared, heads * parts * words) : nullptr;
  const auto own = [&] { return pe::scratch<uint32_t>(Slot::task, pe::few_words(x)); };
  const auto merge = [&](int64_t head, const float* from) {
    PE_CALL(prefix_attention_few_merge)(x, head / x.kv_heads, head % x.kv_heads, parts, from, own());
  };
  torch::stable::parallel_for(0, split ? heads * parts : heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = split ? i / parts : i, first = split ? i % parts : 0, last = split ? first + 1 : parts;
      float* all = split ? shared + head * parts * words : pe::scratch<float>(Slot::sums, parts * words);
      for (int64_t part = first; part < last; ++part) PE_CALL(prefix_attention_few_part)
      (x, head / x.kv_heads, head % x.kv_heads, part, all + part * words, own());
      if (!split) merge(head, all);
    }
  });
  // A second parallel region would cost more than the few sums.
  for (int64_t head = 0; head < heads && split; ++head) merge(head, shared + head * parts * words);
}

std::tuple<Tensor, Tensor> prefix_attention_forward(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v,
                                                    std::optional<Tensor> first, std::optional<Tensor> last,
                                                    std::optional<Tensor> bias, bool causal, double scale,
                                                    double dropout_p, std::optional<Tensor> seed, double softcap) {
  pe::require(q.dim() == 4, "q (B, H, T, D)");
  Tensor out = by_token(q);
  Tensor lse = pe::empty({q.size(0), q.size(1), q.size(2)}, torch::headeronly::ScalarType::Float);
  PrefixAttentionArgs x =
      arguments(q, k, v, prefix_k, prefix_v, first, last, bias, causal, scale, dropout_p, seed, softcap);
  x.out = heads4(out), x.lse = static_cast<float*>(lse.data_ptr());
  // That path has no dropout: training asks for few queries seldom.
  if (x.rows() > 0 && x.rows() <= pe::kFewRows && x.dropout_p == 0.0f) {
    forward_few(x);
    return {out, lse};
  }
  pack_shared(x, false);
  // Where queries see what is before them, the last see most.
  const int64_t chunks = (x.rows() + kForwardRows - 1) / kForwardRows, heads = x.batch * x.kv_heads;
  hand_out(heads * chunks, [&](int64_t i) {
    const int64_t row0 = (chunks - 1 - i / heads) * kForwardRows, head = i % heads;
    PE_CALL(prefix_attention_forward_task)
    (x, head / x.kv_heads, head % x.kv_heads, row0, std::min(x.rows(), row0 + kForwardRows), scratch(x));
  });
  return {out, lse};
}

// Of out and lse, which the GPU's kernels read, nothing is needed here.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prefix_attention_backward(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, std::optional<Tensor>,
    std::optional<Tensor>, std::optional<Tensor> first, std::optional<Tensor> last, std::optional<Tensor> bias,
    bool causal, double scale, double dropout_p, std::optional<Tensor> seed, double softcap) {
  for (const Tensor* t : {&q, &k, &v, &prefix_k, &prefix_v})
    pe::require(t->dim() == 4, "q, k, v and prefix (B, H, T, D)");
  Tensor dq = by_token(q), dk = by_token(k), dv = by_token(v);
  const auto empty_like = [](const Tensor& t) { return pe::like(t, {t.size(0), t.size(1), t.size(2), t.size(3)}); };
  Tensor dprefix_k = empty_like(prefix_k), dprefix_v = empty_like(prefix_v);
  PrefixAttentionArgs x =
      arguments(q, k, v, prefix_k, prefix_v, first, last, bias, causal, scale, dropout_p, seed, softcap);
  pe::require(dout.dim() == 4 && pe::is_dense(dout, 3) && same_sizes(dout, q) && pe::type_of(dout) == x.type,
              "dout of q's sizes and dtype, of stride 1 along D");
  x.dout = heads4(dout);
  x.dq = heads4(dq), x.dk = heads4(dk), x.dv = heads4(dv);
  x.dprefix_k = heads4(dprefix_k), x.dprefix_v = heads4(dprefix_v);
  if (x.prefix == 0) {
    const std::vector<Segment> all = segments(x);
    hand_out(static_cast<int64_t>(all.size()) * x.kv_heads, [&](int64_t i) {
      PE_CALL(prefix_attention_backward_segment)(x, all[i / x.kv_heads], i % x.kv_heads, scratch(x));
    });
    return {dq, dk, dv, dprefix_k, dprefix_v};
  }
  pack_shared(x, true);
  const int64_t most = x.shared ? std::max<int64_t>(1, kSums / x.kv_heads) : x.batch;
  const int64_t each = std::max<int64_t>(1, (x.batch + most - 1) / std::max<int64_t>(1, most));
  const int64_t chunks = (x.batch + each - 1) / each, area = 2 * pe::padded(x.prefix) * pe::padded(x.head_dim);
  float* sums = x.shared ? pe::scratch<float>(Slot::sums, chunks * x.kv_heads * area) : nullptr;
  torch::stable::parallel_for(0, chunks * x.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b0 = i / x.kv_heads * each;
      PE_CALL(prefix_attention_backward_task)
      (x, b0, std::min(x.batch, b0 + each), i % x.kv_heads, sums + i * area, scratch(x));
    }
  });
  if (x.shared)
    torch::stable::parallel_for(0, x.kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) PE_CALL(prefix_attention_write_prefix)
      (x, g, sums + g * area, chunks, x.kv_heads * area, reinterpret_cast<float*>(scratch(x)));
    });
  return {dq, dk, dv, dprefix_k, dprefix_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_engine, CPU, m) {
  m.impl("prefix_attention_forward", TORCH_BOX(&prefix_attention_forward));
  m.impl("prefix_attention_backward", TORCH_BOX(&prefix_attention_backward));
}
