// Attention in which each query sees one interval of keys; see peft_engine/ops/attention.py.
#pragma once

#include <cstdint>

#include "nf4.h"

namespace pe {

// A (B, H, T, D) tensor by its strides; the last is 1.
struct Heads4 {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

struct AttentionArgs {
  Type type;
  int64_t heads, kv_heads, queries, keys, head_dim;
  float scale;
  const int32_t *first, *last;  // (B, queries) each, or both null: causal, the last query sees the last key
  Heads4 q, k, v, out;          // forward
  Heads4 dout, dq, dk, dv;      // backward

  int64_t first_key(int64_t b, int64_t i) const { return first == nullptr ? 0 : first[b * queries + i]; }
  int64_t last_key(int64_t b, int64_t i) const {
    return last == nullptr ? keys - queries + i + 1 : last[b * queries + i];
  }
};

// Queries q0 .. q1 see keys of k0 .. k1 only, and no other query does: one document of a packed row.
struct Segment {
  int64_t b, q0, q1, k0, k1;
};

constexpr int kQueryBlock = 24;

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

}  // namespace pe
