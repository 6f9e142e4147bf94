// The keys of one thread block: scores, the softmax online, and the sums of values, for up to kN rows.
//
// A warp reads whole keys: kLanes lanes have the head_dim of one, 16 bytes (or twice that) each, so that a load brings
// kGroups keys. Lanes copy with cp.async and read back what they themselves copied: no barrier but the last. Each group
// of lanes has its own softmax; they are added up at the end, in order.
#pragma once

#include "convert.cuh"
#include "lane_sums.cuh"
#include "prefix_attention_call.cuh"
#include "ptx.cuh"

namespace {

// exp in float32, exp2 (of scores that were multiplied by log2 e) where q is of half precision.
template <typename T>
constexpr bool kExact = sizeof(T) == 4;

template <typename T>
__device__ __forceinline__ float power(float x) {
  return kExact<T> ? expf(x) : exp2f(x);
}

// The logarithm of a sum of powers, to the base e.
template <typename T>
__device__ __forceinline__ float log_of(float top, float sum) {
  return (kExact<T> ? top : top * 0.6931471805599453f) + logf(sum);
}

__device__ __forceinline__ float no_score() { return __uint_as_float(0xff800000u); }

// What scores are taken from before exp: 0 where there is none yet.
__device__ __forceinline__ float base_of(float top) { return top == no_score() ? 0.0f : top; }

template <typename T, int kLanes_, int kVectors_>
struct Shape {
  static constexpr int kLanes = kLanes_, kVectors = kVectors_;
  static constexpr int kPer16 = 16 / sizeof(T), kElements = kPer16 * kVectors;  // of a key in a lane
  static constexpr int kD = kLanes * kElements;                                 // head_dim, padded
  static constexpr int kGroups = 32 / kLanes, kAhead = 4 / kVectors;            // keys of a lane at a time
  static constexpr int kTile = kGroups * kAhead;                                // keys of a warp at a time
  static constexpr int kStage = 2 * 4 * 32 * 16;                                // bytes: of keys, then of values
  static constexpr int kStates = kWarps * kGroups;                              // softmaxes of a block
  // Shared memory: two stages for each warp; after that the states' sums of values, then their largest scores and sums.
  static constexpr int kStaged = kWarps * 2 * kStage;
  static constexpr int kSums = kStates * kPrefixRows * kD * 4;
  static constexpr int kTopsAt = kStaged > kSums ? kStaged : kSums;
  static constexpr int kFlagsAt = kTopsAt + kStates * kPrefixRows * 8;
  static constexpr int kBytes = kFlagsAt + kPrefixRows * 4;
  static_assert(kBytes <= 48 * 1024 && kMaxSlots * kPrefixRows * 8 <= kTopsAt);
};

template <typename T, typename S, int kN>
struct Attend {
  const Call& call;
  const Work& work;
  unsigned char* const shared;
  const int lane = lane_id(), warp = threadIdx.x / 32;
  const int group = lane / S::kLanes, column = lane % S::kLanes;
  const Keys &keys, &values;
  int64_t keys_from, values_from;  // the head's first
  float q[kN][S::kElements];
  float acc[kN][S::kElements] = {};
  float top = no_score(), total = 0.0f;  // of my_row()
  int2 seen;                             // by my_row()
  int begin, end;                        // of the keys that any row sees

  __device__ __forceinline__ Attend(const Call& c, const Work& w, unsigned char* s)
      : call(c),
        work(w),
        shared(s),
        keys(w.of_prefix ? c.prefix_k : c.k),
        values(w.of_prefix ? c.prefix_v : c.v),
        keys_from(w.batch * keys.batch + w.head * keys.head),
        values_from(w.batch * values.batch + w.head * values.head) {}

  // The row whose score a lane has once lane_sums() has spread them, and a lane that has a row's.
  __device__ __forceinline__ int my_row() const { return summed_in<kN, S::kLanes>(lane); }
  __device__ __forceinline__ float of_row(float mine, int row) const {
    return __shfl_sync(0xffffffffu, mine, summed_in<kN, S::kLanes>(row), S::kLanes);
  }

  // Element e of a lane, in head_dim.
  __device__ __forceinline__ int at(int e) const {
    return (e / S::kPer16 * S::kLanes + column) * S::kPer16 + e % S::kPer16;
  }

  // Which keys each row sees, and from where to where any does. A row that is not there sees none.
  __device__ __forceinline__ void look() {
    seen = make_int2(0, 0);
    int least = work.end, most = work.begin;
#pragma unroll 1
    for (int i = 0; i < kN; ++i) {
      int b, row;
      if (!work.place(call, i, &b, &row)) continue;
      int2 of = work.of_prefix ? make_int2(0, call.prefix) : seen_by(call, b, row / call.group);
      of.x = max(of.x, work.begin), of.y = min(of.y, work.end);
      if (i == my_row()) seen = of;
      if (of.x < of.y) least = min(least, of.x), most = max(most, of.y);
    }
    begin = least, end = max(most, least);
  }

  __device__ __forceinline__ void load_q() {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      int b, row;
      const bool there = work.place(call, i, &b, &row);
      const int64_t from = there ? b * call.q_batch + (work.head * call.group + row % call.group) * call.q_head +
                                       row / call.group * call.q_query
                                 : 0;
#pragma unroll
      for (int e = 0; e < S::kElements; ++e) {
        const bool inside = there && at(e) < call.head_dim;
        q[i][e] = inside ? widen(static_cast<const T*>(call.q)[from + at(e)]) : 0.0f;
      }
    }
  }

  __device__ __forceinline__ unsigned char* stage(int buffer) const {
    return shared + (warp * 2 + buffer) * S::kStage + lane * 16;
  }

  // Asks for the keys and values of a tile: 512 bytes of a warp for each of a lane's keys and vectors. Past the end, and
  // past head_dim, zeros come.
  __device__ __forceinline__ void load(int buffer, int first) {
    unsigned char* to = stage(buffer);
    if (first < end && keys.layout == Layout::aligned && values.layout == Layout::aligned) {
#pragma unroll
      for (int i = 0; i < S::kAhead * S::kVectors; ++i) {
        const int key = first + i / S::kVectors * S::kGroups + group, d = at(i % S::kVectors * S::kPer16);
        const bool there = key < end && d < call.head_dim;
        const int64_t place = there ? d : 0;
        const T* k = static_cast<const T*>(keys.data) + place + (there ? keys_from + key * keys.key : 0);
        const T* v = static_cast<const T*>(values.data) + place + (there ? values_from + key * values.key : 0);
        cp_async_16(to + i * 512, k, there ? 16 : 0);
        cp_async_16(to + S::kStage / 2 + i * 512, v, there ? 16 : 0);
      }
    } else if (first < end) {
#pragma unroll 1
      for (int i = 0; i < 2 * S::kAhead * S::kVectors; ++i) {
        const int in_tile = i / 2, key = first + in_tile / S::kVectors * S::kGroups + group;
        gather(to + i % 2 * (S::kStage / 2) + in_tile * 512, i % 2 == 0 ? keys : values,
               i % 2 == 0 ? keys_from : values_from, key, at(in_tile % S::kVectors * S::kPer16));
      }
    }
    cp_async_commit();
  }

  // 16 bytes of a key, from element d on, one by one.
  __device__ __forceinline__ void gather(unsigned char* to, const Keys& from, int64_t head, int key, int d) const {
    const int64_t place = head + key * from.key + d;
#pragma unroll
    for (int i = 0; i < S::kPer16; ++i) {
      float value = 0.0f;
      if (key < end && d + i < call.head_dim) {
        value = from.layout == Layout::wide ? static_cast<const float*>(from.data)[place + i]
                                            : widen(static_cast<const T*>(from.data)[place + i]);
      }
      round_to(reinterpret_cast<T*>(to) + i, value);
    }
  }

  // One of a lane's keys (which = 0) or values (1) of a tile.
  __device__ __forceinline__ void read(int buffer, int which, int u, float (&to)[S::kElements]) const {
#pragma unroll
    for (int v = 0; v < S::kVectors; ++v) {
      const unsigned char* from = stage(buffer) + which * (S::kStage / 2) + (u * S::kVectors + v) * 512;
      widen_words(T(), *reinterpret_cast<const uint4*>(from), to + v * S::kPer16);
    }
  }

  __device__ __forceinline__ void add_tile(int buffer, int first, float unit) {
    float score[S::kAhead], higher = top;
#pragma unroll
    for (int u = 0; u < S::kAhead; ++u) {
      float k[S::kElements], part[kN];
      read(buffer, 0, u, k);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        part[i] = 0.0f;
#pragma unroll
        for (int e = 0; e < S::kElements; ++e) part[i] = fmaf(q[i][e], k[e], part[i]);
      }
      const int key = first + u * S::kGroups + group;
      lane_sums<S::kLanes>(part);
      score[u] = part[0] * unit;
      if (key < seen.x || key >= seen.y) score[u] = no_score();
      higher = fmaxf(higher, score[u]);
    }
    const float base = base_of(higher), fade = power<T>(top - base);
    if (__any_sync(0xffffffffu, higher != top)) {  // rare, after the first tiles
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const float of = of_row(fade, i);
#pragma unroll
        for (int e = 0; e < S::kElements; ++e) acc[i][e] *= of;
      }
    }
    total *= fade, top = higher;
#pragma unroll
    for (int u = 0; u < S::kAhead; ++u) {
      float v[S::kElements];
      read(buffer, 1, u, v);
      const float p = power<T>(score[u] - base);
      total += p;
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const float of = of_row(p, i);
#pragma unroll
        for (int e = 0; e < S::kElements; ++e) acc[i][e] = fmaf(of, v[e], acc[i][e]);
      }
    }
  }

  // What this group of lanes has, where the others' will lie as well.
  __device__ __forceinline__ void store_state() const {
    const int state = warp * S::kGroups + group;
    float* sums = reinterpret_cast<float*>(shared) + state * kN * S::kD;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
#pragma unroll
      for (int e = 0; e < S::kElements; ++e) sums[i * S::kD + at(e)] = acc[i][e];
    }
    float2* tops = reinterpret_cast<float2*>(shared + S::kTopsAt);
    if (column < kN) tops[state * kN + my_row()] = make_float2(top, total);
  }

  __device__ __forceinline__ void run() {
    look();
    const float unit = kExact<T> ? call.scale : call.scale * 1.4426950408889634f;
    const int step = kWarps * S::kTile;
    int buffer = 0;
    for (int first = begin + warp * S::kTile - step; first < end; first += step) {
      load(buffer, first + step);
      buffer = 1 - buffer;
      if (first < begin) {
        load_q();
      } else {
        cp_async_wait<1>();
        add_tile(buffer, first, unit);
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // the stages are no longer read
    store_state();
    __syncthreads();  // all states are there
  }
};

}  // namespace
