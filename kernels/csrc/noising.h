// Joint noising of tokens and their vectors (kernels/noising.py says what it computes): its arguments, for the host and
// for CUDA. kernels/arguments.py has the same structures; a pointer that is null means "not asked for".
#pragma once

#include "core.h"

namespace braid {

enum Kind : uint8_t { KEPT = 0, MASKED = 1, REPLACED = 2 };

// One float32 for each position [rows, length], or for each row (column_stride 0).
struct PerPosition {
  const float* values;
  int64_t row_stride, column_stride;
};
BRAID_FUNCTION float at(const PerPosition& x, int64_t row, int64_t column) {
  return x.values[row * x.row_stride + column * x.column_stride];
}

struct NoisingArguments {
  const int64_t* tokens;     // [rows, length]
  const void* vectors;       // [table_rows, channels], or [rows, length, channels] where table_rows is 0
  const int64_t* key;        // [1] on the device; null: key_value
  int64_t key_value;
  const int64_t* ordinals;   // [rows]
  const int64_t* positions;  // [rows, length], or [length] where positions_row_stride is 0
  const uint8_t* keep;       // bool [rows, length]
  const float* weights_by_kind;  // [rows, 3]
  PerPosition mask_below, noise_below, alpha, sigma, alpha_corrupted, sigma_corrupted;

  int64_t* noised_tokens;  // [rows, length]
  uint8_t* kind;           // [rows, length]
  void* latents;           // [rows, length, channels]
  float* eps;              // [rows, length, channels]
  float* weights;          // [rows, length]

  int64_t rows, length, channels, table_rows, positions_row_stride;
  int64_t mask_id, num_tokens, first_channel;
  int32_t word, draw, embed_noised;
  int32_t vectors_bfloat16, latents_bfloat16;
};

// Sorted positions whose contributions to the table's gradient one CUDA warp adds up.
constexpr int64_t PIECE = 128;

// The gradient of `latents` to vectors, alpha and sigma. Here `forward.kind` is an input, `forward.tokens` are the table
// rows that were embedded, and the draws are made anew. `vectors_gradient` [rows, length, channels] has the vectors'
// type; `table_gradient` float32 [table_rows, channels] is 0 before.
struct NoisingGradients {
  NoisingArguments forward;
  const void* latents_gradient;  // [rows, length, channels]
  const int64_t* order;          // [rows * length]: the positions sorted by table row, stable; null: atomics (CUDA)
  void* vectors_gradient;
  float* table_gradient;
  float* partials;               // CUDA with `order`: [ceil(rows * length / PIECE), 2, channels]
  float* alpha_gradient;         // [rows, length]
  float* sigma_gradient;         // [rows, length]
};

struct Noised {
  int64_t token;
  uint8_t kind;
};

// Token i = (row, column): masked or replaced as its uniform says, unless it is kept.
BRAID_FUNCTION Noised noised_token(const NoisingArguments& a, int64_t i, int64_t row, int64_t column, uint32_t position,
                                   int64_t ordinal, Key key) {
  const int64_t token = a.tokens[i];
  if ((!a.mask_below.values && !a.noise_below.values) || (a.keep && a.keep[i])) return {token, KEPT};
  const Words words = philox(position, counter_word(STREAM_TOKEN, (uint32_t)a.draw, 0), ordinal, key);
  const float u = to_uniform(word_of(words, a.word));
  if (a.mask_below.values && u < at(a.mask_below, row, column)) return {a.mask_id, MASKED};
  if (a.noise_below.values && u < at(a.noise_below, row, column)) {
    const int64_t replacement = multiply_high(words.w1, (uint32_t)a.num_tokens);
    return {replacement + (replacement >= a.mask_id), REPLACED};
  }
  return {token, KEPT};
}

struct Coefficients {
  float alpha, sigma;
};
BRAID_FUNCTION Coefficients coefficients(const NoisingArguments& a, uint8_t kind, int64_t row, int64_t column) {
  const bool other = kind != KEPT && a.alpha_corrupted.values;
  return {at(other ? a.alpha_corrupted : a.alpha, row, column), at(other ? a.sigma_corrupted : a.sigma, row, column)};
}

}  // namespace braid
