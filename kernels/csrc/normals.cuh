// Normals by themselves on a device: one thread for each block of four channels.
#pragma once

#include "device.cuh"
#include "normals.h"

namespace braid {

static __global__ void __launch_bounds__(THREADS) normals_kernel(const __grid_constant__ NormalArguments a) {
  BRAID_NORMALS_IN_SHARED_MEMORY(table)
  const Key key = read_key(a.key, a.key_value);
  const int64_t skipped = a.first_channel % 4, num_blocks = (skipped + a.channels + 3) / 4;
  const int64_t count = a.rows * a.length * num_blocks;
  for (int64_t item = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; item < count;
       item += (int64_t)gridDim.x * blockDim.x) {
    const int64_t i = item / num_blocks, block = item % num_blocks, row = i / a.length;
    const uint32_t position = (uint32_t)a.positions[row * a.positions_row_stride + i % a.length];
    float normals[4];
    normal_block(table, position, (uint32_t)(a.first_channel / 4 + block), a.draw, a.ordinals[row], key, normals);
    float* to = a.normals + i * a.channels + 4 * block - skipped;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t channel = 4 * block - skipped + j;
      if (channel >= 0 && channel < a.channels) to[j] = normals[j];
    }
  }
}

}  // namespace braid
