// What device code of all operations shares: nvcc and NVRTC compile it, and so does the emulator of the tests.
#pragma once

#include "normal_table.h"

namespace braid {

constexpr int THREADS = 256;
constexpr int WARP = 32;

// The table of normals in shared memory, filled by all threads of a block.
#define BRAID_NORMALS_IN_SHARED_MEMORY(table)                                             \
  __shared__ braid::Segment table[braid::NUM_SEGMENTS];                                   \
  for (int i = threadIdx.x; i < braid::NUM_SEGMENTS; i += blockDim.x) table[i] = braid::NORMAL_TABLE[i]; \
  __syncthreads();

// The four normals of one block of channels.
__device__ __forceinline__ void normal_block(const Segment* table, uint32_t position, uint32_t block, uint32_t draw,
                                             int64_t ordinal, Key key, float* normals) {
  const Words words = philox(position, counter_word(STREAM_NORMAL, draw, block), ordinal, key);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = word_of(words, i);
    const float x = normal_argument(word);
    const Segment segment = table[segment_of(x)];
    normals[i] = to_normal(word, x, segment.offset, segment.slope);
  }
}

// ---- eight values at a time, 16 bytes to an access ----------------------------------------------------------------

__device__ __forceinline__ void load8(const float* from, float* values) {
  const float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
  values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
  values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
}
__device__ __forceinline__ void load8(const bfloat16* from, float* values) {
  const uint4 packed = *(const uint4*)from;
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = from_bits(pairs[i] << 16);
    values[2 * i + 1] = from_bits(pairs[i] & 0xFFFF0000u);
  }
}
__device__ __forceinline__ void store8(float* to, const float* values) {
  ((float4*)to)[0] = make_float4(values[0], values[1], values[2], values[3]);
  ((float4*)to)[1] = make_float4(values[4], values[5], values[6], values[7]);
}
__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return (uint32_t)to_bfloat16(low).bits | (uint32_t)to_bfloat16(high).bits << 16;
#endif
}
__device__ __forceinline__ void store8(bfloat16* to, const float* values) {
  uint4 packed;
  packed.x = bfloat16_pair(values[0], values[1]);
  packed.y = bfloat16_pair(values[2], values[3]);
  packed.z = bfloat16_pair(values[4], values[5]);
  packed.w = bfloat16_pair(values[6], values[7]);
  *(uint4*)to = packed;
}

// The sum over `lanes` neighbours (a power of two); all lanes of a warp must call it.
__device__ __forceinline__ float sum_over_lanes(float value, int lanes) {
  for (int distance = lanes / 2; distance; distance /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

}  // namespace braid
