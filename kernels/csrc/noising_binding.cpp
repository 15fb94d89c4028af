#include <algorithm>
#include <atomic>

#include "binding.h"
#include "noising_cuda.h"
#include "noising_host.h"

namespace braid {
namespace {

// Work for one thread, in channels: less is not worth waking it.
constexpr int64_t GRAIN = 1 << 13;

PerPosition per_position(const OptionalTensor& x) {
  if (!x) return {nullptr, 0, 0};
  return {(const float*)x->data_ptr(), x->stride(0), x->stride(1)};
}

NoisingArguments inputs(const OptionalTensor& tokens, const OptionalTensor& vectors, const Tensor& key,
                        const Tensor& ordinals, const Tensor& positions, int64_t length, int64_t first_channel,
                        int64_t draw, const OptionalTensor& alpha, const OptionalTensor& sigma,
                        const OptionalTensor& alpha_corrupted, const OptionalTensor& sigma_corrupted) {
  NoisingArguments a = {};
  a.tokens = pointer<int64_t>(tokens);
  a.vectors = pointer<void>(vectors);
  set_key(a, key);
  a.ordinals = pointer<int64_t>(ordinals);
  a.positions = pointer<int64_t>(positions);
  a.positions_row_stride = positions.dim() == 2 ? length : 0;
  a.alpha = per_position(alpha);
  a.sigma = per_position(sigma);
  a.alpha_corrupted = per_position(alpha_corrupted);
  a.sigma_corrupted = per_position(sigma_corrupted);
  a.rows = ordinals.size(0);
  a.length = length;
  a.first_channel = first_channel;
  a.draw = (int32_t)draw;
  if (vectors) {
    a.channels = vectors->size(vectors->dim() - 1);
    a.table_rows = vectors->dim() == 2 ? vectors->size(0) : 0;
    a.vectors_bfloat16 = is_bfloat16(*vectors);
  }
  return a;
}

void run_forward(const NoisingArguments& a, const Tensor& on) {
#if defined(BRAID_CUDA)
  if (on.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    return check_launch(braid_launch_noising(&a, current_stream(on)));
  }
#endif
  STD_TORCH_CHECK(on.is_cpu(), "braid: this library was built for the CPU alone");
  const HostNoising& host = noising_here();
  std::atomic<bool> fine{true};
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(16, a.channels));
  torch::stable::parallel_for(0, a.rows * a.length, grain, [&](int64_t first, int64_t last) {
    if (!host.forward(a, first, last)) fine = false;
  });
  STD_TORCH_CHECK(fine, "braid: a token has no row in the table of vectors");
}

void run_backward(const NoisingGradients& g, const Tensor& on) {
#if defined(BRAID_CUDA)
  if (on.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    return check_launch(braid_launch_noising_backward(&g, current_stream(on)));
  }
#endif
  STD_TORCH_CHECK(on.is_cpu(), "braid: this library was built for the CPU alone");
  const HostNoising& host = noising_here();
  const int64_t count = g.forward.rows * g.forward.length;
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(16, g.forward.channels));
  if (g.vectors_gradient || g.alpha_gradient || g.sigma_gradient)
    torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) { host.backward(g, first, last); });
  if (g.table_gradient)
    torch::stable::parallel_for(0, count * ((g.forward.channels + 63) / 64), GRAIN / 64,
                                [&](int64_t first, int64_t last) { host.table_gradient(g, first, last); });
}

void noise_into(OptionalTensor tokens, OptionalTensor vectors, Tensor key, Tensor ordinals, Tensor positions,
                OptionalTensor keep, OptionalTensor weights_by_kind, OptionalTensor mask_below,
                OptionalTensor noise_below, OptionalTensor alpha, OptionalTensor sigma, OptionalTensor alpha_corrupted,
                OptionalTensor sigma_corrupted, int64_t mask_id, int64_t num_tokens, int64_t first_channel,
                int64_t word, int64_t draw, bool embed_noised, OptionalTensor latents, OptionalTensor noised_tokens,
                OptionalTensor kind, OptionalTensor eps, OptionalTensor weights) {
  STD_TORCH_CHECK(tokens || latents, "braid: neither tokens nor latents");
  const int64_t length = tokens ? tokens->size(1) : latents->size(1);
  NoisingArguments a = inputs(tokens, vectors, key, ordinals, positions, length, first_channel, draw, alpha, sigma,
                              alpha_corrupted, sigma_corrupted);
  a.keep = pointer<uint8_t>(keep);
  a.weights_by_kind = pointer<float>(weights_by_kind);
  a.mask_below = per_position(mask_below);
  a.noise_below = per_position(noise_below);
  a.mask_id = mask_id;
  a.num_tokens = num_tokens;
  a.word = (int32_t)word;
  a.embed_noised = embed_noised;
  a.noised_tokens = pointer<int64_t>(noised_tokens);
  a.kind = pointer<uint8_t>(kind);
  a.latents = pointer<void>(latents);
  a.eps = pointer<float>(eps);
  a.weights = pointer<float>(weights);
  a.latents_bfloat16 = latents && is_bfloat16(*latents);
  run_forward(a, ordinals);
}

void noise_backward_into(Tensor latents_gradient, OptionalTensor sources, OptionalTensor kind, OptionalTensor order,
                         Tensor vectors, Tensor key, Tensor ordinals, Tensor positions, Tensor alpha,
                         OptionalTensor alpha_corrupted, int64_t first_channel, int64_t draw,
                         OptionalTensor vectors_gradient, OptionalTensor table_gradient, OptionalTensor partials,
                         OptionalTensor alpha_gradient, OptionalTensor sigma_gradient) {
  NoisingGradients g = {};
  // The coefficients of the noise are not needed; alpha's stand in for them.
  g.forward = inputs(sources, vectors, key, ordinals, positions, latents_gradient.size(1), first_channel, draw, alpha,
                     alpha, alpha_corrupted, alpha_corrupted);
  g.forward.kind = pointer<uint8_t>(kind);
  g.forward.latents_bfloat16 = is_bfloat16(latents_gradient);
  g.latents_gradient = pointer<void>(latents_gradient);
  g.order = pointer<int64_t>(order);
  g.vectors_gradient = pointer<void>(vectors_gradient);
  g.table_gradient = pointer<float>(table_gradient);
  g.partials = pointer<float>(partials);
  g.alpha_gradient = pointer<float>(alpha_gradient);
  g.sigma_gradient = pointer<float>(sigma_gradient);
  STD_TORCH_CHECK(!g.table_gradient || g.order || latents_gradient.is_cuda(), "braid: the host needs the order");
  run_backward(g, ordinals);
}

STABLE_TORCH_LIBRARY_FRAGMENT(braid, m) {
  m.def(
      "noise_into(Tensor? tokens, Tensor? vectors, Tensor key, Tensor ordinals, Tensor positions, Tensor? keep, "
      "Tensor? weights_by_kind, Tensor? mask_below, Tensor? noise_below, Tensor? alpha, Tensor? sigma, "
      "Tensor? alpha_corrupted, Tensor? sigma_corrupted, int mask_id, int num_tokens, int first_channel, int word, "
      "int draw, bool embed_noised, Tensor(a!)? latents, Tensor(b!)? noised_tokens, Tensor(c!)? kind, "
      "Tensor(d!)? eps, Tensor(e!)? weights) -> ()");
  m.def(
      "noise_backward_into(Tensor latents_gradient, Tensor? sources, Tensor? kind, Tensor? order, Tensor vectors, "
      "Tensor key, Tensor ordinals, Tensor positions, Tensor alpha, Tensor? alpha_corrupted, int first_channel, "
      "int draw, Tensor(a!)? vectors_gradient, Tensor(b!)? table_gradient, Tensor(c!)? partials, "
      "Tensor(d!)? alpha_gradient, Tensor(e!)? sigma_gradient) -> ()");
}

#define BRAID_NOISING_ON(device)                            \
  STABLE_TORCH_LIBRARY_IMPL(braid, device, m) {             \
    m.impl("noise_into", TORCH_BOX(&noise_into));           \
    m.impl("noise_backward_into", TORCH_BOX(&noise_backward_into)); \
  }
BRAID_NOISING_ON(CPU)
#if defined(BRAID_CUDA)
BRAID_NOISING_ON(CUDA)
#endif

}  // namespace
}  // namespace braid
