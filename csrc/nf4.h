// The NF4 format: tables and how a scale is read. The same definitions as peft_engine/ops/nf4.py.
#pragma once

#include <cstdint>

namespace pe {

inline constexpr float kNf4Code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// 256 values of the signed dynamic 8-bit type, handed over once by Python, which is where they are defined.
extern float absmax_code[256];

enum class Type : int { f32, bf16, f16, nf4 };

// A row-major matrix, dense or NF4.
struct Matrix {
  const void* data = nullptr;  // values, or packed nibbles, the first of a byte in the high half
  Type type = Type::f32;
  int64_t rows = 0, cols = 0;
  const float* absmax = nullptr;          // NF4: one scale a block, or
  const uint8_t* absmax_index = nullptr;  // its 8-bit index, with
  const float* nested_absmax = nullptr;   // a scale for every 256 and
  float offset = 0.0f;                    // the mean that was taken off
  int block_shift = 6;                    // log2 of the block size

  float scale(int64_t block) const {
    if (absmax_index == nullptr) return absmax[block];
    return absmax_code[absmax_index[block]] * nested_absmax[block >> 8] + offset;
  }

  int code_index(int64_t i) const {
    const uint8_t byte = static_cast<const uint8_t*>(data)[i >> 1];
    return i & 1 ? byte & 15 : byte >> 4;
  }
};

}  // namespace pe
