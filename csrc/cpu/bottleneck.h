// The arguments of the bottleneck kernels; the maths is in peft_engine/ops/bottleneck.py.
#pragma once

#include "nf4.h"

namespace pe {

enum class Activation : int { relu, gelu, silu, tanh };  // as ACTIVATIONS in peft_engine/ops/bottleneck.py

struct BottleneckAdapter {
  const void* down;       // (width, features)
  const void* down_bias;  // (width,) or null
  const void* up;         // (features, width)
  const void* up_bias;    // (features,) or null
  Type type;              // of these
  const void* norm;       // (features,), or null where there is no norm
  const void* norm_bias;  // (features,) or null
  Type norm_type;
  int64_t features, width;
  Activation activation;
  float scaling;
};

struct BottleneckForward {
  BottleneckAdapter adapter;
  const void* x;         // (rows, features)
  const void* residual;  // the same, or x itself
  Type type;             // of these and y
  int64_t rows;
  float eps;
  void* y;
  void* middle;  // (rows, width) of the adapter's type
  float* stats;  // (rows, 2): mean and rstd; written where there is a norm
};

// What is null is not wanted.
struct BottleneckBackward {
  BottleneckAdapter adapter;
  const void* dy;      // (rows, features)
  const void* x;       // read for ddown and with a norm
  const void* middle;  // (rows, width)
  const float* stats;
  Type type;
  int64_t rows;
  bool residual_is_x;
  void *dx, *ddown, *ddown_bias, *dup, *dup_bias, *dnorm, *dnorm_bias;
};

}  // namespace pe
