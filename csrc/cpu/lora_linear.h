// The arguments of the lora_linear kernels; the maths is in peft_engine/ops/lora_linear.py.
#pragma once

#include "nf4.h"

namespace pe {

struct Adapter {
  const void* a = nullptr;  // (rank, in_features)
  const void* b = nullptr;  // (out_features, rank)
  Type type = Type::f32;
  int64_t rank = 0;  // 0: none
  float scaling = 1.0f;
  double dropout_p = 0.0;
  uint32_t threshold = 0;  // round(dropout_p 2^32)
  uint64_t seed = 0;
};

struct LoraLinearForward {
  const void* x;  // (rows, in_features)
  Type type;      // of x and y
  int64_t rows;
  Matrix w;  // (out_features, in_features)
  Adapter adapter;
  const void* bias;
  Type bias_type;
  void* y;   // (rows, out_features)
  float* h;  // (rows, rank)
};

struct LoraLinearBackward {
  const void* dy;  // (rows, out_features)
  const void* x;   // (rows, in_features), read for da only
  Type type;
  int64_t rows;
  Matrix w;
  Adapter adapter;
  const float* h;  // (rows, rank), read for db only
  void* dx;        // each null where it is not needed
  void* da;
  void* db;
};

}  // namespace pe
