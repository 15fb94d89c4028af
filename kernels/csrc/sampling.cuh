// Draws of tokens on a device: one block of threads for each row, four neighbouring tokens to a thread at a time.
#pragma once

#include "device.cuh"
#include "sampling.h"

namespace braid {

constexpr int NUM_WARPS = THREADS / WARP;
constexpr int NUM_BINS = 2048;
constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;

// ---- what all threads of a block come to together -----------------------------------------------------------------

struct Sum {
  float largest;
  double total;  // of exp((logit - largest) / temperature)
  int bad;
};
__device__ __forceinline__ void join(Sum& sum, float largest, double total, int bad, double temperature) {
  if (largest > sum.largest) {
    sum.total = sum.total * exponential(((double)sum.largest - largest) / temperature) + total;
    sum.largest = largest;
  } else if (largest > no_logit()) {
    sum.total += total * exponential(((double)largest - sum.largest) / temperature);
  }
  sum.bad |= bad;
}

struct SamplingMemory {
  Sum sums[NUM_WARPS];
  Race races[NUM_WARPS];
  double references[NUM_WARPS];
  unsigned long long bins[NUM_BINS];
  unsigned long long above, target_bin;
  double total;
  long long last;
};

__device__ __forceinline__ Sum block_sum(SamplingMemory& memory, Sum sum, double temperature) {
  for (int distance = WARP / 2; distance; distance /= 2) {
    const float largest = __shfl_xor_sync(ALL_LANES, sum.largest, distance);
    const double total = __shfl_xor_sync(ALL_LANES, sum.total, distance);
    const int bad = __shfl_xor_sync(ALL_LANES, sum.bad, distance);
    join(sum, largest, total, bad, temperature);
  }
  __syncthreads();
  if (threadIdx.x % WARP == 0) memory.sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  sum = memory.sums[0];
  for (int w = 1; w < NUM_WARPS; ++w)
    join(sum, memory.sums[w].largest, memory.sums[w].total, memory.sums[w].bad, temperature);
  return sum;
}

__device__ __forceinline__ void warp_merge(Race& race) {
  for (int distance = WARP / 2; distance; distance /= 2) {
    const double time = __shfl_xor_sync(ALL_LANES, race.time, distance);
    const double second = __shfl_xor_sync(ALL_LANES, race.second, distance);
    const int token = __shfl_xor_sync(ALL_LANES, (int)race.token, distance);
    // Lanes may know the same token.
    if (token == race.token) {
      race.second = second < race.second ? second : race.second;
    } else {
      merge(race, {time, second, token});
    }
  }
}

// ---- one row ------------------------------------------------------------------------------------------------------

template <class Logit>
struct DeviceRow {
  const Logit *logits, *other;
  Nucleus nucleus;
  bool cut;

  __device__ __forceinline__ float at(const SamplingArguments& a, int64_t token) const {
    if (token >= a.size || token == a.left_out) return no_logit();
    const float logit = other ? add(multiply(a.guidance, load(logits + token)), multiply(a.rest, load(other + token)))
                              : load(logits + token);
    return !cut || is_kept(nucleus, logit, token) || logit != logit ? logit : no_logit();
  }
};

template <class Logit>
__device__ __forceinline__ Sum sum_row(SamplingMemory& memory, const SamplingArguments& a, const DeviceRow<Logit>& row) {
  Sum sum = {no_logit(), 0, 0};
  const float inverse = (float)(1 / a.temperature);
  float part = 0;  // of few logits at a time, so that float32 is enough
  int terms = 0;
  for (int64_t token = threadIdx.x; token < a.size; token += blockDim.x) {
    const float logit = row.at(a, token);
    if (!(logit <= LARGEST)) sum.bad = 1;
    if (logit > sum.largest) {
      sum.total = (sum.total + part) * exponential(((double)sum.largest - logit) / a.temperature);
      part = 0;
      sum.largest = logit;
    }
    if (sum.largest > no_logit()) part += exponential((logit - sum.largest) * inverse);
    if (++terms % 32 == 0) sum.total += part, part = 0;
  }
  sum.total += part;
  return block_sum(memory, sum, a.temperature);
}

template <class Logit>
__device__ __forceinline__ double exact_total(SamplingMemory& memory, const SamplingArguments& a,
                                              const DeviceRow<Logit>& row, const Law& law) {
  Sum sum = {0, 0, 0};
  for (int64_t token = threadIdx.x; token < a.size; token += blockDim.x)
    sum.total += exponential((double)row.at(a, token) / law.temperature - law.reference);
  return block_sum(memory, sum, 1).total;
}

// Finds where the nucleus ends, as the host does (sampling_host.cpp).
template <class Logit>
__device__ __forceinline__ void cut_row(SamplingMemory& memory, const SamplingArguments& a, DeviceRow<Logit>& row,
                                        const Law& law, double& total) {
  uint32_t prefix = 0;
  uint64_t above = 0, last_mass = 0;
  double target = 0;
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const int width = shift ? 11 : 10;
    __syncthreads();
    for (int b = threadIdx.x; b < NUM_BINS; b += blockDim.x) memory.bins[b] = 0;
    __syncthreads();
    for (int64_t token = threadIdx.x; token < a.size; token += blockDim.x) {
      const float logit = row.at(a, token);
      const uint32_t order = sortable(logit);
      if (shift < 21 && order >> (shift + width) != prefix) continue;
      atomicAdd(&memory.bins[order >> shift & ((1u << width) - 1)], (unsigned long long)mass_of(law, logit));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if (shift == 21) {
        uint64_t all = 0;
        for (int b = 0; b < NUM_BINS; ++b) all += memory.bins[b];
        memory.total = a.top_p * (double)all;
      }
      int lowest = 0, bin = -1;
      for (int b = (1 << width) - 1; b >= 0 && bin < 0; --b) {
        if (!memory.bins[b]) continue;
        lowest = b;
        if ((double)(above + memory.bins[b]) >= memory.total) bin = b;
        else above += memory.bins[b];
      }
      if (bin < 0) bin = lowest, above -= memory.bins[bin];
      memory.above = above;
      memory.target_bin = (unsigned long long)bin;
    }
    __syncthreads();
    above = memory.above;
    target = memory.total;
    prefix = prefix << width | (uint32_t)memory.target_bin;
    last_mass = memory.bins[memory.target_bin];
  }
  row.nucleus = end_of_nucleus(law, prefix, above, last_mass, target, total);
  if (row.nucleus.last < 0) {  // some of the equal logits at the end: the first ones
    __syncthreads();
    if (threadIdx.x == 0) {
      int64_t keep = -row.nucleus.last;
      memory.last = a.size;
      for (int64_t token = 0; token < a.size && keep; ++token)
        if (row.at(a, token) == row.nucleus.threshold && --keep == 0) memory.last = token;
    }
    __syncthreads();
    row.nucleus.last = memory.last;
  }
  row.cut = true;
}

__device__ __forceinline__ float warp_largest(float value) {
  for (int distance = WARP / 2; distance; distance /= 2) {
    const float other = __shfl_xor_sync(ALL_LANES, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// The race of `run` in sampling_host.cpp. Lanes of a warp share the best time; warps meet at the end.
template <class Logit>
__device__ __forceinline__ Race run(SamplingMemory& memory, const SamplingArguments& a, const DeviceRow<Logit>& row,
                                    const Draw& draw, Law law, float reference, bool moving, int64_t noisy, Race race,
                                    int& bad) {
  const float inverse = (float)(1 / a.temperature), slope = (float)law.slope, floor = (float)law.floor;
  const float room = (float)(60 * a.temperature);
  float limit = limit_of(race);
  bad = 0;
  const int lane = threadIdx.x % WARP;
  for (int64_t start = (int64_t)(threadIdx.x / WARP) * (4 * WARP); start < a.size; start += 4 * THREADS) {
    const int64_t token = start + 4 * lane;
    Words high = {0xFFFFFFFFu, 0xFFFFFFFFu, 0xFFFFFFFFu, 0xFFFFFFFFu};
    if (!draw.greedy)
      high = philox(draw.position, counter_word(STREAM_CATEGORICAL, draw.draw, (uint32_t)(token >> 2) & 0xFFFFu),
                    draw.ordinal, draw.key);
    float logits[4], times[4];  // bounds of the times, from below
    const float raise_above = moving ? reference + room : LARGEST;
    bool look = false;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      logits[j] = row.at(a, token + j);
      const float weight = slope * exponential((logits[j] - reference) * inverse) + floor;
      look |= !(to_float(word_of(high, j)) * 0x1p-32f > limit * weight) | !(logits[j] <= raise_above);
      bad |= logits[j] == infinity() || logits[j] != logits[j];
    }
    if (!__any_sync(ALL_LANES, look)) continue;
    float largest = no_logit();  // without NaN: all lanes are to agree
#pragma unroll
    for (int j = 0; j < 4; ++j) largest = logits[j] > largest ? logits[j] : largest;
    largest = warp_largest(largest);
    if (moving && (largest > raise_above || reference == no_logit())) {
      if (!(largest > no_logit() && largest <= LARGEST)) continue;
      const double raised = (double)largest / a.temperature;
      race.time /= exponential(law.reference - raised);
      law.reference = raised;
      reference = largest;
    }
    // First from float32 bounds: who finishes after somebody else's latest time is not looked at.
    float latest = limit_of(race);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool races = token + j < a.size && !(a.noisy && (token + j == noisy || token + j == a.left_out));
      const float weight = races ? slope * exponential((logits[j] - reference) * inverse) + floor : 0;
      const float v = to_float(word_of(high, j)) * 0x1p-32f;
      times[j] = weight > 0 ? v / weight : infinity();
      const float bound = draw.greedy ? times[j] : times[j] / (1.0000002f - v);  // -log(1 - v) <= v / (1 - v)
      latest = bound * (float)SLACK < latest ? bound * (float)SLACK : latest;
    }
    latest = -warp_largest(-latest);
#pragma unroll 1
    for (int j = 0; j < 4; ++j)
      if (times[j] <= latest * (float)SLACK && times[j] < infinity())
        enter(race, draw, token + j, word_of(high, j), weight(law, logits[j]));
    warp_merge(race);
    limit = limit_of(race);
  }
  bad = __any_sync(ALL_LANES, bad);
  __syncthreads();
  if (lane == 0) {
    memory.races[threadIdx.x / WARP] = race;
    memory.references[threadIdx.x / WARP] = law.reference;
    memory.sums[threadIdx.x / WARP].bad = bad;
  }
  __syncthreads();
  for (int w = 0; w < NUM_WARPS; ++w) bad |= memory.sums[w].bad;
  double common = memory.references[0];
  for (int w = 1; w < NUM_WARPS; ++w) common = memory.references[w] > common ? memory.references[w] : common;
  Race best = new_race();
  for (int w = 0; w < NUM_WARPS; ++w) {
    Race other = memory.races[w];
    const double shrink = moving ? exponential(memory.references[w] - common) : 1;
    other.time /= shrink;
    other.second /= shrink;
    if (other.token == best.token) {  // all warps know those that entered first
      best.second = other.second < best.second ? other.second : best.second;
    } else {
      merge(best, other);
    }
  }
  return best;
}

template <class Logit>
__device__ __forceinline__ int64_t draw_row(SamplingMemory& memory, const SamplingArguments& a, int64_t i) {
  const int64_t noisy = a.noisy ? a.noisy[i] : -1;
  if (a.noisy && arrival(a, noisy) == 0) return noisy;
  const int64_t from = (a.rows ? a.rows[i] : i) * a.logits_stride;
  DeviceRow<Logit> row = {(const Logit*)a.logits + from, a.other ? (const Logit*)a.other + from : nullptr, {}, false};
  const Draw draw = draw_of(a, i);
  int bad = 0;
  if (!a.noisy && a.top_p >= 1) {
    const Law law = {a.temperature, -NEVER, 1, 0};
    const Race race = run(memory, a, row, draw, law, no_logit(), true, -1, new_race(), bad);
    return bad ? -1 : race.token;
  }
  const Sum sum = sum_row(memory, a, row);
  if (sum.bad || sum.largest == no_logit()) return -1;
  const Law law = {a.temperature, (double)sum.largest / a.temperature, 1, 0};
  double total = sum.total;
  bool exact = a.top_p < 1;
  if (exact) cut_row(memory, a, row, law, total);
  if (!a.noisy) return run(memory, a, row, draw, law, sum.largest, false, -1, new_race(), bad).token;
  for (;; exact = true, total = exact_total(memory, a, row, law)) {
    Race race = new_race();
    enter_noisy(race, a, draw, noisy, row.at(a, noisy), law.reference, total);
    race = run(memory, a, row, draw, reverse_law(a, noisy, law.reference, total), sum.largest, false, noisy, race, bad);
    if (exact || race.second > race.time * (1 + CLOSE)) return race.token;
  }
}

template <class Logit>
static __global__ void __launch_bounds__(THREADS) sampling_kernel(const __grid_constant__ SamplingArguments a) {
  __shared__ SamplingMemory memory;
  for (int64_t i = blockIdx.x; i < a.count; i += gridDim.x) {
    const int64_t token = draw_row<Logit>(memory, a, i);
    if (threadIdx.x == 0) a.tokens[i] = token;
  }
}

}  // namespace braid
