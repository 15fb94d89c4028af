// Joint noising on a device. `lanes` threads of a warp (a power of two) work on one position, eight channels each at a
// time; EIGHTS says that all channels come in such pieces: their number a multiple of 8, the first one of 4, and every
// array of vectors at a multiple of 16 bytes.
#pragma once

#include "device.cuh"
#include "noising.h"

namespace braid {

// Calls body(i, row, column, lane) for each position i: rows * length of them, `lanes` threads each. Positions past the
// last are given as -1, for all lanes of a warp go through the body together.
template <class Body>
__device__ __forceinline__ void for_positions(const NoisingArguments& a, int lanes, const Body& body) {
  const int64_t count = a.rows * a.length;
  const int64_t at_a_time = (int64_t)gridDim.x * (blockDim.x / lanes);
  const int per_warp = WARP / lanes, lane = threadIdx.x % lanes, group = threadIdx.x % WARP / lanes;
  int64_t first = (int64_t)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / WARP * per_warp;
  for (; first < count; first += at_a_time) {
    const int64_t i = first + group < count ? first + group : -1;
    body(i, i / a.length, i % a.length, lane);
  }
}

// Calls body(channel, number, normals) for this lane's share of the channels: pieces of `number` from `channel` on.
template <bool EIGHTS, bool DRAW, class Body>
__device__ __forceinline__ void for_channels(const NoisingArguments& a, const Segment* table, int lanes, int lane,
                                             uint32_t position, int64_t ordinal, Key key, const Body& body) {
  const uint32_t first_block = (uint32_t)(a.first_channel / 4);
  if (EIGHTS) {
#pragma unroll 1
    for (int channel = 8 * lane; channel < a.channels; channel += 8 * lanes) {
      float normals[8] = {};
      if (DRAW) {
        normal_block(table, position, first_block + channel / 4, a.draw, ordinal, key, normals);
        normal_block(table, position, first_block + channel / 4 + 1, a.draw, ordinal, key, normals + 4);
      }
      body(channel, 8, normals);
    }
  } else {
    const int skipped = (int)(a.first_channel % 4);
#pragma unroll 1
    for (int start = 4 * lane; start < skipped + a.channels; start += 4 * lanes) {
      float normals[4] = {};
      if (DRAW) normal_block(table, position, first_block + start / 4, a.draw, ordinal, key, normals);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = start - skipped + i;
        if (channel >= 0 && channel < a.channels) body(channel, 1, normals + i);
      }
    }
  }
}

template <bool EIGHTS, class T>
__device__ __forceinline__ void load_piece(const T* from, float* values) {
  if (EIGHTS) {
    load8(from, values);
  } else {
    values[0] = load(from);
  }
}
template <bool EIGHTS, class T>
__device__ __forceinline__ void store_piece(T* to, const float* values) {
  if (EIGHTS) {
    store8(to, values);
  } else {
    store(to, values[0]);
  }
}

template <class Vector, class Latent, bool EIGHTS>
__global__ void __launch_bounds__(THREADS) noising_kernel(const __grid_constant__ NoisingArguments a, int lanes) {
  BRAID_NORMALS_IN_SHARED_MEMORY(table)
  constexpr int PIECES = EIGHTS ? 8 : 1;
  const Key key = read_key(a.key, a.key_value);
  for_positions(a, lanes, [&](int64_t i, int64_t row, int64_t column, int lane) {
    if (i < 0) return;
    const uint32_t position = (uint32_t)a.positions[row * a.positions_row_stride + column];
    const int64_t ordinal = a.ordinals[row];
    Noised noised = {0, KEPT};
    if (a.tokens) {
      noised = noised_token(a, i, row, column, position, ordinal, key);
      if (lane == 0) {
        a.noised_tokens[i] = noised.token;
        a.kind[i] = noised.kind;
        if (a.weights) a.weights[i] = a.weights_by_kind[3 * row + noised.kind];
      }
    }
    if (!a.vectors) return;
    int64_t source = i;
    if (a.table_rows) {
      source = a.embed_noised ? noised.token : a.tokens[i];
      if (source < 0 || source >= a.table_rows) __trap();
    }
    const Coefficients c = coefficients(a, noised.kind, row, column);
    const Vector* vector = (const Vector*)a.vectors + source * a.channels;
    Latent* latent = (Latent*)a.latents + i * a.channels;
    float* eps = a.eps ? a.eps + i * a.channels : nullptr;
    for_channels<EIGHTS, true>(a, table, lanes, lane, position, ordinal, key,
                               [&](int channel, int, const float* normals) {
                                 float values[PIECES];
                                 load_piece<EIGHTS>(vector + channel, values);
#pragma unroll
                                 for (int j = 0; j < PIECES; ++j)
                                   values[j] = add(multiply(c.alpha, values[j]), multiply(c.sigma, normals[j]));
                                 store_piece<EIGHTS>(latent + channel, values);
                                 if (eps) store_piece<EIGHTS>(eps + channel, normals);
                               });
  });
}

__device__ __forceinline__ void add_to_memory(float* to, const float* values, int number) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (number == 8) {
#pragma unroll
    for (int j = 0; j < 8; j += 4)
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                   :
                   : "l"(to + j), "f"(values[j]), "f"(values[j + 1]), "f"(values[j + 2]), "f"(values[j + 3])
                   : "memory");
    return;
  }
#endif
  for (int j = 0; j < number; ++j) atomicAdd(to + j, values[j]);
}

// Everything but the table's gradient in a fixed order. DRAW: sigma's gradient is asked for.
template <class Vector, class Latent, bool EIGHTS, bool DRAW>
__global__ void __launch_bounds__(THREADS) noising_backward_kernel(const __grid_constant__ NoisingGradients g, int lanes) {
  const NoisingArguments& a = g.forward;
  BRAID_NORMALS_IN_SHARED_MEMORY(table)
  constexpr int PIECES = EIGHTS ? 8 : 1;
  const Key key = read_key(a.key, a.key_value);
  const bool to_table = g.table_gradient && !g.order;
  for_positions(a, lanes, [&](int64_t i, int64_t row, int64_t column, int lane) {
    float of_alpha = 0, of_sigma = 0;
    if (i >= 0) {
      const uint32_t position = (uint32_t)a.positions[row * a.positions_row_stride + column];
      const float alpha = coefficients(a, a.kind ? a.kind[i] : (uint8_t)KEPT, row, column).alpha;
      const int64_t source = a.table_rows ? a.tokens[i] : i;
      const Vector* vector = (const Vector*)a.vectors + source * a.channels;
      const Latent* gradient = (const Latent*)g.latents_gradient + i * a.channels;
      for_channels<EIGHTS, DRAW>(a, table, lanes, lane, position, a.ordinals[row], key,
                                 [&](int channel, int, const float* normals) {
                                   float values[PIECES], clean[PIECES];
                                   load_piece<EIGHTS>(gradient + channel, values);
                                   if (g.alpha_gradient) load_piece<EIGHTS>(vector + channel, clean);
#pragma unroll
                                   for (int j = 0; j < PIECES; ++j) {
                                     if (g.alpha_gradient) of_alpha += values[j] * clean[j];
                                     if (DRAW) of_sigma += values[j] * normals[j];
                                     values[j] = multiply(alpha, values[j]);
                                   }
                                   if (g.vectors_gradient)
                                     store_piece<EIGHTS>((Vector*)g.vectors_gradient + i * a.channels + channel, values);
                                   if (to_table)
                                     add_to_memory(g.table_gradient + source * a.channels + channel, values, PIECES);
                                 });
    }
    of_alpha = sum_over_lanes(of_alpha, lanes);
    of_sigma = sum_over_lanes(of_sigma, lanes);
    if (i >= 0 && lane == 0) {
      if (g.alpha_gradient) g.alpha_gradient[i] = of_alpha;
      if (g.sigma_gradient) g.sigma_gradient[i] = of_sigma;
    }
  });
}

// ---- the table's gradient in a fixed order ------------------------------------------------------------------------
//
// Positions sorted by their row of the table are cut into pieces of PIECE. A warp adds up one piece, CHANNELS_PER_WARP
// channels of it, row by row. A row that lies within the piece is done; what continues from the piece before goes to the
// piece's first partial sum, what begins here and continues in the next one to the second. Then each row that crosses
// pieces is added up from its partial sums, in order.

constexpr int CHANNELS_PER_LANE = 4;
constexpr int CHANNELS_PER_WARP = WARP * CHANNELS_PER_LANE;

__device__ __forceinline__ int64_t sorted_source(const NoisingGradients& g, int64_t sorted) {
  return g.forward.tokens[g.order[sorted]];
}
// Whether the sorted positions before and at `sorted` have the same row. There is none before 0 and none at the end.
__device__ __forceinline__ bool continues(const NoisingGradients& g, int64_t sorted, int64_t count) {
  return sorted > 0 && sorted < count && sorted_source(g, sorted - 1) == sorted_source(g, sorted);
}

template <class Latent>
__global__ void __launch_bounds__(THREADS) table_pieces_kernel(const __grid_constant__ NoisingGradients g) {
  const NoisingArguments& a = g.forward;
  const int64_t count = a.rows * a.length, num_pieces = (count + PIECE - 1) / PIECE;
  const int64_t piece = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  if (piece >= num_pieces) return;
  const int64_t channel = (int64_t)blockIdx.y * CHANNELS_PER_WARP + threadIdx.x % WARP;
  const int64_t first = piece * PIECE, last = first + PIECE < count ? first + PIECE : count;
  const bool from_before = continues(g, first, count), to_next = continues(g, last, count);
  float sums[CHANNELS_PER_LANE] = {};
  bool is_first_row = true;
  for (int64_t sorted = first; sorted < last; ++sorted) {
    const int64_t i = g.order[sorted];
    const float alpha = coefficients(a, a.kind[i], i / a.length, i % a.length).alpha;
    const Latent* gradient = (const Latent*)g.latents_gradient + i * a.channels;
#pragma unroll
    for (int j = 0; j < CHANNELS_PER_LANE; ++j)
      if (channel + j * WARP < a.channels)
        sums[j] = add(sums[j], multiply(alpha, load(gradient + channel + j * WARP)));
    const bool ends_here = sorted + 1 == last || !continues(g, sorted + 1, count);
    if (!ends_here) continue;
    float* to = g.table_gradient + a.tokens[i] * a.channels;
    if (is_first_row && from_before) {
      to = g.partials + 2 * piece * a.channels;
    } else if (sorted + 1 == last && to_next) {
      to = g.partials + (2 * piece + 1) * a.channels;
    }
#pragma unroll
    for (int j = 0; j < CHANNELS_PER_LANE; ++j) {
      if (channel + j * WARP < a.channels) to[channel + j * WARP] = sums[j];
      sums[j] = 0;
    }
    is_first_row = false;
  }
}

static __global__ void __launch_bounds__(THREADS) table_partials_kernel(const __grid_constant__ NoisingGradients g) {
  const NoisingArguments& a = g.forward;
  const int64_t count = a.rows * a.length, num_pieces = (count + PIECE - 1) / PIECE;
  const int64_t piece = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  if (piece >= num_pieces) return;
  const int64_t channel = (int64_t)blockIdx.y * CHANNELS_PER_WARP + threadIdx.x % WARP;
  const int64_t first = piece * PIECE, next = first + PIECE;
  if (!continues(g, next, count)) return;
  const int64_t source = sorted_source(g, next);
  if (sorted_source(g, first) == source && continues(g, first, count)) return;  // it begins in an earlier piece
  float sums[CHANNELS_PER_LANE];
#pragma unroll
  for (int j = 0; j < CHANNELS_PER_LANE; ++j)
    if (channel + j * WARP < a.channels) sums[j] = g.partials[(2 * piece + 1) * a.channels + channel + j * WARP];
  int64_t other = piece;
  do {
    ++other;
#pragma unroll
    for (int j = 0; j < CHANNELS_PER_LANE; ++j)
      if (channel + j * WARP < a.channels)
        sums[j] = add(sums[j], g.partials[2 * other * a.channels + channel + j * WARP]);
  } while (sorted_source(g, (other + 1) * PIECE < count ? (other + 1) * PIECE - 1 : count - 1) == source &&
           continues(g, (other + 1) * PIECE, count));
#pragma unroll
  for (int j = 0; j < CHANNELS_PER_LANE; ++j)
    if (channel + j * WARP < a.channels) g.table_gradient[source * a.channels + channel + j * WARP] = sums[j];
}

// ---- how the kernels are launched ---------------------------------------------------------------------------------

BRAID_FUNCTION bool is_multiple_of_16(const void* address) { return (uint64_t)address % 16 == 0; }

BRAID_FUNCTION bool in_eights(const NoisingArguments& a) {
  return a.channels % 8 == 0 && a.first_channel % 4 == 0 && is_multiple_of_16(a.vectors) && is_multiple_of_16(a.latents) &&
         is_multiple_of_16(a.eps);
}
BRAID_FUNCTION bool in_eights(const NoisingGradients& g) {
  return in_eights(g.forward) && is_multiple_of_16(g.latents_gradient) && is_multiple_of_16(g.vectors_gradient) &&
         is_multiple_of_16(g.table_gradient);
}
BRAID_FUNCTION int lanes_for(const NoisingArguments& a, bool eights) {
  const int64_t pieces = eights ? a.channels / 8 : (a.first_channel % 4 + a.channels + 3) / 4;
  int lanes = 1;
  while (lanes < WARP && lanes < pieces) lanes *= 2;
  return lanes;
}

}  // namespace braid
