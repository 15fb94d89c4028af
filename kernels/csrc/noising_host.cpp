#include "noising_host.h"

#include "host_normals.h"

namespace braid {
namespace {

template <class Vector, class Latent>
bool forward(const NoisingArguments& a, int64_t first, int64_t last) {
  const Key key = read_key(a.key, a.key_value);
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = i / a.length, column = i % a.length;
    const uint32_t position = (uint32_t)a.positions[row * a.positions_row_stride + column];
    const int64_t ordinal = a.ordinals[row];
    Noised noised = {0, KEPT};
    if (a.tokens) {
      noised = noised_token(a, i, row, column, position, ordinal, key);
      a.noised_tokens[i] = noised.token;
      a.kind[i] = noised.kind;
      if (a.weights) a.weights[i] = a.weights_by_kind[3 * row + noised.kind];
    }
    if (!a.vectors) continue;
    int64_t source = i;
    if (a.table_rows) {
      source = a.embed_noised ? noised.token : a.tokens[i];
      if (source < 0 || source >= a.table_rows) return false;
    }
    const Vector* vector = (const Vector*)a.vectors + source * a.channels;
    Latent* latent = (Latent*)a.latents + i * a.channels;
    float* eps = a.eps ? a.eps + i * a.channels : nullptr;
    const Coefficients c = coefficients(a, noised.kind, row, column);
    for_normals(position, a.first_channel, a.channels, (uint32_t)a.draw, ordinal, key,
                [&](int64_t channel, const float* __restrict normals, int64_t number) {
                  const Vector* __restrict from = vector + channel;
                  Latent* __restrict to = latent + channel;
                  const auto mix = [&](int64_t j) {
                    store(to + j, add(multiply(c.alpha, load(from + j)), multiply(c.sigma, normals[j])));
                  };
                  if (number == TILE) {
                    for (int64_t j = 0; j < TILE; ++j) mix(j);
                  } else {
                    for (int64_t j = 0; j < number; ++j) mix(j);
                  }
                  if (eps) __builtin_memcpy(eps + channel, normals, number * sizeof(float));
                });
  }
  return true;
}

constexpr int SUMS = 16;  // partial sums of one dot product: a fixed order on every instruction set

template <class Vector, class Latent>
void backward(const NoisingGradients& g, int64_t first, int64_t last) {
  const NoisingArguments& a = g.forward;
  const Key key = read_key(a.key, a.key_value);
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = i / a.length, column = i % a.length;
    const uint32_t position = (uint32_t)a.positions[row * a.positions_row_stride + column];
    const Coefficients c = coefficients(a, a.kind ? a.kind[i] : (uint8_t)KEPT, row, column);
    const Vector* vector = (const Vector*)a.vectors + (a.table_rows ? a.tokens[i] : i) * a.channels;
    const Latent* gradient = (const Latent*)g.latents_gradient + i * a.channels;
    if (g.vectors_gradient) {
      Vector* to = (Vector*)g.vectors_gradient + i * a.channels;
      for (int64_t j = 0; j < a.channels; ++j) store(to + j, multiply(c.alpha, load(gradient + j)));
    }
    if (g.alpha_gradient) {
      float sums[SUMS] = {};
      int64_t j = 0;
      for (; j + SUMS <= a.channels; j += SUMS)
        for (int k = 0; k < SUMS; ++k) sums[k] += load(gradient + j + k) * load(vector + j + k);
      for (int k = 0; j + k < a.channels; ++k) sums[k] += load(gradient + j + k) * load(vector + j + k);
      float sum = 0;
      for (int k = 0; k < SUMS; ++k) sum += sums[k];
      g.alpha_gradient[i] = sum;
    }
    if (g.sigma_gradient) {
      float sums[SUMS] = {};
      for_normals(position, a.first_channel, a.channels, (uint32_t)a.draw, a.ordinals[row], key,
                  [&](int64_t channel, const float* __restrict normals, int64_t number) {
                    const Latent* __restrict of = gradient + channel;
                    if (number == TILE) {
                      for (int j = 0; j < TILE; j += SUMS)
                        for (int k = 0; k < SUMS; ++k) sums[k] += load(of + j + k) * normals[j + k];
                    } else {
                      for (int64_t j = 0; j < number; ++j) sums[j % SUMS] += load(of + j) * normals[j];
                    }
                  });
      float sum = 0;
      for (int k = 0; k < SUMS; ++k) sum += sums[k];
      g.sigma_gradient[i] = sum;
    }
  }
}

// Each element of the table's gradient is one sum in the order of positions, whoever computes it.
template <class Latent>
void table_gradient(const NoisingGradients& g, int64_t first, int64_t last) {
  const NoisingArguments& a = g.forward;
  const int64_t count = a.rows * a.length;
  for (int64_t item = first; item < last; ++item) {
    const int64_t start = item % count, source = a.tokens[g.order[start]];
    if (start && a.tokens[g.order[start - 1]] == source) continue;
    const int64_t channel = item / count * TILE;
    const int64_t number = a.channels - channel < TILE ? a.channels - channel : TILE;
    float sums[TILE] = {};
    for (int64_t sorted = start; sorted < count; ++sorted) {
      const int64_t i = g.order[sorted];
      if (a.tokens[i] != source) break;
      const float alpha = coefficients(a, a.kind[i], i / a.length, i % a.length).alpha;
      const Latent* __restrict gradient = (const Latent*)g.latents_gradient + i * a.channels + channel;
      if (number == TILE) {
        for (int j = 0; j < TILE; ++j) sums[j] = add(sums[j], multiply(alpha, load(gradient + j)));
      } else {
        for (int64_t j = 0; j < number; ++j) sums[j] = add(sums[j], multiply(alpha, load(gradient + j)));
      }
    }
    __builtin_memcpy(g.table_gradient + source * a.channels + channel, sums, number * sizeof(float));
  }
}

bool forward_any(const NoisingArguments& a, int64_t first, int64_t last) {
  if (a.vectors_bfloat16)
    return a.latents_bfloat16 ? forward<bfloat16, bfloat16>(a, first, last) : forward<bfloat16, float>(a, first, last);
  return a.latents_bfloat16 ? forward<float, bfloat16>(a, first, last) : forward<float, float>(a, first, last);
}

void backward_any(const NoisingGradients& g, int64_t first, int64_t last) {
  if (g.forward.vectors_bfloat16) {
    if (g.forward.latents_bfloat16) return backward<bfloat16, bfloat16>(g, first, last);
    return backward<bfloat16, float>(g, first, last);
  }
  if (g.forward.latents_bfloat16) return backward<float, bfloat16>(g, first, last);
  return backward<float, float>(g, first, last);
}

void table_gradient_any(const NoisingGradients& g, int64_t first, int64_t last) {
  if (g.forward.latents_bfloat16) return table_gradient<bfloat16>(g, first, last);
  return table_gradient<float>(g, first, last);
}

}  // namespace

namespace BRAID_ISA {
const HostNoising noising = {forward_any, backward_any, table_gradient_any};
}

}  // namespace braid
