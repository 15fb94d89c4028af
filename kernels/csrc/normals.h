// Standard normals by themselves: `random.normal`. kernels/arguments.py has the same structure.
#pragma once

#include "core.h"

namespace braid {

struct NormalArguments {
  float* normals;  // [rows, length, channels]
  const int64_t* key;        // [1] on the device; null: key_value
  int64_t key_value;
  const int64_t* ordinals;   // [rows]
  const int64_t* positions;  // [rows, length], or [length] where positions_row_stride is 0
  int64_t rows, length, channels, positions_row_stride, first_channel;
  int32_t draw;
};

}  // namespace braid
