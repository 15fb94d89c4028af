#include "launch.h"
// The emulator's words for CUDA's come first.
#include "noising.cuh"
#include "noising_cuda.h"

using namespace braid;

extern "C" int braid_launch_noising(const NoisingArguments* arguments, void* stream) {
  const NoisingArguments& a = *arguments;
  const bool eights = in_eights(a);
  const int lanes = lanes_for(a, eights);
  const unsigned blocks = blocks_for(a.rows * a.length, THREADS / lanes);
  return with_type(a.vectors_bfloat16, [&](auto vector) {
    return with_type(a.latents_bfloat16, [&](auto latent) {
      return with_flag(eights, [&](auto in_eights) {
        using Vector = typename decltype(vector)::type;
        using Latent = typename decltype(latent)::type;
        return launch(noising_kernel<Vector, Latent, decltype(in_eights)::value>, blocks, THREADS, stream, a, lanes);
      });
    });
  });
}

extern "C" int braid_launch_noising_backward(const NoisingGradients* gradients, void* stream) {
  const NoisingGradients& g = *gradients;
  const NoisingArguments& a = g.forward;
  const int64_t count = a.rows * a.length;
  int error = 0;
  if (g.vectors_gradient || g.alpha_gradient || g.sigma_gradient || (g.table_gradient && !g.order)) {
    const bool eights = in_eights(g);
    const int lanes = lanes_for(a, eights);
    const unsigned blocks = blocks_for(count, THREADS / lanes);
    error = with_type(a.vectors_bfloat16, [&](auto vector) {
      return with_type(a.latents_bfloat16, [&](auto latent) {
        return with_flag(eights, [&](auto in_eights) {
          return with_flag(g.sigma_gradient, [&](auto draw) {
            using Vector = typename decltype(vector)::type;
            using Latent = typename decltype(latent)::type;
            constexpr bool EIGHTS = decltype(in_eights)::value, DRAW = decltype(draw)::value;
            return launch(noising_backward_kernel<Vector, Latent, EIGHTS, DRAW>, blocks, THREADS, stream, g, lanes);
          });
        });
      });
    });
  }
  if (error || !g.table_gradient || !g.order) return error;
  const int64_t num_pieces = (count + PIECE - 1) / PIECE, per_block = THREADS / WARP;
  const dim3 blocks((unsigned)((num_pieces + per_block - 1) / per_block),
                    (unsigned)((a.channels + CHANNELS_PER_WARP - 1) / CHANNELS_PER_WARP));
  error = with_type(a.latents_bfloat16, [&](auto latent) {
    return launch(table_pieces_kernel<typename decltype(latent)::type>, blocks, THREADS, stream, g);
  });
  return error ? error : launch(table_partials_kernel, blocks, THREADS, stream, g);
}
