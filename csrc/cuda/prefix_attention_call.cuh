// What the kernel of prefix_attention.cu is called with, how its work is divided, and where its thread blocks meet.
//
// A target is the rows of one key head in one row of the batch: up to kRows pairs of a query and a head of the group, the
// heads of a query next to each other. Its keys are cut into slots: those of the prefix, then those of the real keys. A
// thread block has one slot of one target; where the batch shares the prefix, one slot of it for as many targets as
// kPrefixRows rows hold. What a block has of a row, unnormalised, is a part in the workspace; who brings the last part of a
// target adds them up, slot after slot.
#pragma once

#include "launch.h"

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kPrefixRows = 8;
constexpr int kMaxTargets = 16384;  // each has a counter
constexpr int kMaxSlots = 256;      // of a target; their weights lie in shared memory
constexpr int kMaxHeadDim = 256;
constexpr int kPrefixSlot = 32;   // keys of the prefix: short, since it may be float32, which is not read ahead
constexpr int kLeastSlot = 64;    // real keys
constexpr int kBlocksWanted = 4;  // on each multiprocessor (two are there at once), slots not shorter than that

inline int rows_of_kernel(int rows) { return rows <= 4 ? 4 : 8; }

struct Plan {
  int row_tiles;       // of the rows of a key head
  int targets;         // batch x kv_heads x row_tiles
  int prefix_batches;  // rows of the batch that one block reads the prefix for
  int prefix_slots, key_slots;
  int key_slot;  // keys of each
  int prefix_blocks;

  __host__ __device__ int slots() const { return prefix_slots + key_slots; }
  __host__ __device__ int64_t blocks() const { return prefix_blocks + static_cast<int64_t>(targets) * key_slots; }
};

// Keys as they lie in memory, from one head's first. They are read 16 bytes at a time, or (apart) as they come.
enum class Layout : int { aligned, apart, wide };  // wide: float32, where q is of half precision

struct Keys {
  const void* data;
  int64_t batch, head, key;  // strides
  Layout layout;
};

struct Call {
  const void* q;
  int64_t q_batch, q_head, q_query;
  Keys k, v, prefix_k, prefix_v;
  const int* first;  // (batch, queries), or null, and then
  const int* last;
  bool causal;
  float scale;
  int batch, kv_heads, group, queries, keys, prefix, head_dim;
  void* out;
  int64_t out_batch, out_head, out_query;
  float* lse;  // (batch, heads, queries)
  unsigned* arrivals;
  float2* part_sums;  // (targets, slots, rows): the largest score, and the sum of exp(score - that)
  float* parts;       // (targets, slots, rows, head_dim): sums of exp(score - that) times the value
  Plan plan;

  __host__ __device__ int rows() const { return group * queries; }
};

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

inline Plan plan_of(int batch, int kv_heads, int rows, int keys, int prefix, bool shared_prefix, int multiprocessors) {
  Plan plan{};
  const int at_once = rows_of_kernel(rows);
  plan.row_tiles = divide_up(rows, at_once);
  plan.targets = batch * kv_heads * plan.row_tiles;
  plan.prefix_batches = shared_prefix && rows <= kPrefixRows ? kPrefixRows / rows : 1;
  plan.prefix_slots = divide_up(prefix, kPrefixSlot);
  if (plan.prefix_slots > kMaxSlots / 2) plan.prefix_slots = kMaxSlots / 2;
  plan.prefix_blocks = divide_up(batch, plan.prefix_batches) * plan.row_tiles * kv_heads * plan.prefix_slots;
  const int wanted = divide_up(kBlocksWanted * multiprocessors, plan.targets), most = divide_up(keys, kLeastSlot);
  int slots = wanted < most ? wanted : most;
  if (slots > kMaxSlots / 2) slots = kMaxSlots / 2;
  if (slots < 1) slots = prefix > 0 && keys == 0 ? 0 : 1;  // a target has a slot, if only an empty one
  plan.key_slot = slots == 0 ? 0 : divide_up(divide_up(keys, slots), kLeastSlot) * kLeastSlot;
  plan.key_slots = plan.key_slot == 0 ? slots : divide_up(keys, plan.key_slot);
  return plan;
}

inline int64_t workspace_bytes(const Plan& plan, int rows, int head_dim) {
  return 4 * (kMaxTargets + int64_t{plan.targets} * plan.slots() * rows_of_kernel(rows) * (2 + int64_t{head_dim}));
}

inline void place_in_workspace(Call& call, void* workspace) {
  call.arrivals = static_cast<unsigned*>(workspace);
  call.part_sums = reinterpret_cast<float2*>(call.arrivals + kMaxTargets);
  call.parts = reinterpret_cast<float*>(call.part_sums +
                                        int64_t{call.plan.targets} * call.plan.slots() * rows_of_kernel(call.rows()));
}

// What one thread block does: a range of keys, for the rows of one target, or of several in a row of the batch each.
struct Work {
  bool of_prefix;
  int head, slot;
  int batch, batches;  // first and how many
  int first_row, per_batch;
  int begin, end;  // keys

  // Of row i of the block; false where there is none.
  __device__ __forceinline__ bool place(const Call& call, int i, int* b, int* row) const {
    *b = batch + i / per_batch;
    *row = first_row + i % per_batch;
    return i < batches * per_batch && *row < call.rows();
  }
};

__device__ __forceinline__ Work work_of(const Call& call, int rows_at_once) {
  const Plan& plan = call.plan;
  Work work{};
  int block = static_cast<int>(blockIdx.x), slots = plan.prefix_slots, keys = call.prefix;
  work.of_prefix = block < plan.prefix_blocks;
  if (!work.of_prefix) block -= plan.prefix_blocks, slots = plan.key_slots, keys = call.keys;
  const int slot = block % slots, tile = block / slots % plan.row_tiles;
  block /= slots * plan.row_tiles;
  work.head = block % call.kv_heads;
  const int together = work.of_prefix ? plan.prefix_batches : 1;
  work.batch = block / call.kv_heads * together;
  work.batches = min(together, call.batch - work.batch);
  work.first_row = tile * rows_at_once;
  work.per_batch = min(rows_at_once, call.rows());
  work.slot = work.of_prefix ? slot : plan.prefix_slots + slot;
  if (work.of_prefix) {
    work.begin = static_cast<int>(int64_t{keys} * slot / slots);
    work.end = static_cast<int>(int64_t{keys} * (slot + 1) / slots);
  } else {
    work.begin = min(slot * plan.key_slot, keys);
    work.end = min(work.begin + plan.key_slot, keys);
  }
  return work;
}

__device__ __forceinline__ int target_of(const Call& call, const Work& work, int b, int rows_at_once) {
  return (b * call.kv_heads + work.head) * call.plan.row_tiles + work.first_row / rows_at_once;
}

// The real keys that a query of a row of the batch sees.
__device__ __forceinline__ int2 seen_by(const Call& call, int b, int query) {
  if (call.first != nullptr) {
    const int at = b * call.queries + query;
    return make_int2(max(call.first[at], 0), min(call.last[at], call.keys));
  }
  return make_int2(0, call.causal ? call.keys - call.queries + query + 1 : call.keys);
}

}  // namespace
