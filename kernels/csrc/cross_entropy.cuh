// Cross-entropy and its gradient on a device: one block of threads for each row, eight neighbouring logits to a thread
// at a time where rows lie on 16-byte boundaries. The row that was read for the statistics comes from the cache again.
#pragma once

#include "cross_entropy.h"
#include "device.cuh"

namespace braid {

constexpr int ROW_WARPS = THREADS / WARP;

struct RowSum {
  float largest;
  double total;
};
__device__ __forceinline__ void join(RowSum& sum, RowSum other) {
  const float largest = other.largest > sum.largest ? other.largest : sum.largest;
  sum.total = sum.total * exponential((double)sum.largest - largest) +
              other.total * exponential((double)other.largest - largest);
  sum.largest = largest;
}

// `number` logits at once: the largest so far moves at most once, the sums of eight are float32.
__device__ __forceinline__ void include(RowSum& sum, const float* logits, int number) {
  float largest = logits[0];
#pragma unroll
  for (int j = 1; j < 8; ++j)
    if (j < number) largest = logits[j] > largest ? logits[j] : largest;
  if (largest > sum.largest) {
    sum.total *= exponential((double)sum.largest - largest);
    sum.largest = largest;
  }
  float part = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (j < number) part += exponential(logits[j] - sum.largest);
  sum.total += part;
}

template <class Logit>
__device__ __forceinline__ void row_statistics(const CrossEntropyArguments& a, int64_t row, int64_t wide) {
  __shared__ RowSum sums[ROW_WARPS];
  const Logit* logits = (const Logit*)a.logits + row * a.stride;
  RowSum sum = {LEAST, 0};
  float values[8];
  for (int64_t j = 8 * (int64_t)threadIdx.x; j < wide; j += 8 * THREADS) {
    load8(logits + j, values);
    if (a.left_out >= j && a.left_out < j + 8) {
#pragma unroll
      for (int k = 0; k < 8; ++k) values[k] = j + k == a.left_out ? -infinity() : values[k];
    }
    include(sum, values, 8);
  }
  for (int64_t j = wide + threadIdx.x; j < a.size; j += THREADS) {
    values[0] = j == a.left_out ? -infinity() : load(logits + j);
    include(sum, values, 1);
  }
  for (int distance = WARP / 2; distance; distance /= 2) {
    RowSum other;
    other.largest = __shfl_xor_sync(0xFFFFFFFFu, sum.largest, distance);
    other.total = __shfl_xor_sync(0xFFFFFFFFu, sum.total, distance);
    join(sum, other);
  }
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < ROW_WARPS; ++w) join(sum, sums[w]);
    a.largest[row] = sum.largest;
    a.total[row] = sum.total;
    a.at_target[row] = logit_of_target(a, logits, a.targets[row]);
  }
  __syncthreads();
}

template <class Logit>
__device__ __forceinline__ void row_gradient(const CrossEntropyArguments& a, int64_t row, int64_t wide) {
  Logit* logits = (Logit*)a.logits + row * a.stride;
  const float weight = a.weights[row], largest = a.largest[row];
  const float scale = weight == 0 ? 0.0f : gradient_scale(a, weight, largest, a.total[row]);
  const int64_t target = a.targets[row];
  const auto gradient_of = [&](float logit, int64_t j) {
    if (weight == 0) return 0.0f;
    const float softmax = j == a.left_out ? 0.0f : scale * exponential(logit - largest);
    return j == target ? softmax - weight : softmax;
  };
  float values[8];
  for (int64_t j = 8 * (int64_t)threadIdx.x; j < wide; j += 8 * THREADS) {
    load8(logits + j, values);
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = gradient_of(values[k], j + k);
    store8(logits + j, values);
  }
  for (int64_t j = wide + threadIdx.x; j < a.size; j += THREADS) store(logits + j, gradient_of(load(logits + j), j));
}

template <class Logit>
static __global__ void __launch_bounds__(THREADS) cross_entropy_kernel(
    const __grid_constant__ CrossEntropyArguments a) {
  const bool aligned = ((uint64_t)a.logits | (uint64_t)a.stride * sizeof(Logit)) % 16 == 0;
  const int64_t wide = aligned ? a.size / 8 * 8 : 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    if (a.statistics) row_statistics<Logit>(a, row, wide);
    if (a.gradient) row_gradient<Logit>(a, row, wide);
  }
}

}  // namespace braid
