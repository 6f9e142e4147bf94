// Attention over learned keys and values in front of the real ones; see peft_engine/ops/prefix_attention.py.
#pragma once

#include <cstdint>

#include "nf4.h"

namespace pe {

// A (B, H, T, D) tensor by its strides; the last is 1.
struct Heads4 {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;
};

// Queries q0 .. q1 of row b see keys of k0 .. k1 only, and no other query does: one document of a packed row.
struct Segment {
  int64_t b, q0, q1, k0, k1;
};

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

struct PrefixAttentionArgs {
  Type type, prefix_type, bias_type;
  int64_t batch, heads, kv_heads, queries, keys, prefix, head_dim;
  bool shared, causal;          // one prefix for all rows of the batch; the last query sees the last key, and so on
  float scale, softcap;         // softcap 0: scores are not capped
  const int32_t *first, *last;  // (batch, queries) each, or both null
  Heads4 q, k, v, prefix_k, prefix_v, out, dout, dq, dk, dv, dprefix_k, dprefix_v;
  const void* bias;  // null, or (batch, heads, queries, keys) with these strides
  int64_t bias_batch, bias_head, bias_query, bias_key;
  float* lse;          // (batch, heads, queries)
  double dropout_p;    // of what is left of the softmax; 0: none
  uint32_t threshold;  // round(dropout_p 2^32)
  uint64_t seed;
  const uint32_t* packed;  // a shared prefix as operands, packed_words for each key/value head

  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return queries * group(); }
  // Intervals are the caller's: none may lead outside of the keys.
  int64_t first_key(int64_t b, int64_t t) const {
    return first == nullptr || first[b * queries + t] < 0 ? 0 : first[b * queries + t];
  }
  int64_t last_key(int64_t b, int64_t t) const {
    if (last != nullptr) return last[b * queries + t] < keys ? last[b * queries + t] : keys;
    return causal ? keys - queries + t + 1 : keys;
  }
};

// Rows that are computed together: token by token, the heads that share a key/value head side by side.
constexpr int kRowBlock = 24;
constexpr int64_t kMostPanel = 64;  // columns of the widest panel of an operand

inline int64_t up_to_panels(int64_t n) { return (n + kMostPanel - 1) / kMostPanel * kMostPanel; }

// Words of one matrix of keys or values as an operand, in either layout.
inline int64_t operand_words(int64_t keys, int64_t head_dim) { return up_to_panels(keys) * up_to_panels(head_dim); }

// A row of scores: prefix, then real keys. An odd number of cache lines, so that a column is not all in one set.
inline int64_t score_stride(int64_t prefix, int64_t keys) { return (padded(prefix) + padded(keys)) / 16 * 16 | 16; }

// Words of scratch that a task asks for at most.
inline int64_t task_words(const PrefixAttentionArgs& x) {
  const int64_t width = up_to_panels(x.head_dim), stride = score_stride(x.prefix, x.keys);
  return 5 * operand_words(x.keys, x.head_dim) + 5 * operand_words(x.prefix, x.head_dim) + 4 * kRowBlock * stride +
         7 * kRowBlock * width + 16 * width + padded(x.keys) + 1024;
}

// Few queries: at most so many rows, keys in parts of so many, and the words that the parts and the work on one take.
constexpr int64_t kFewRows = 8, kPartKeys = 256;

inline int64_t part_count(const PrefixAttentionArgs& x) {
  return (x.prefix + kPartKeys - 1) / kPartKeys + (x.keys + kPartKeys - 1) / kPartKeys;
}

inline int64_t part_words(const PrefixAttentionArgs& x) { return x.rows() * (padded(x.head_dim) + 16); }

inline int64_t few_words(const PrefixAttentionArgs& x) { return 4 * padded(x.head_dim) + 5 * kPartKeys; }

}  // namespace pe
