// Cross-entropy of rows of logits and its gradient, in place (kernels/cross_entropy.py says what is computed): the
// arguments, for the host and for CUDA. kernels/row_arguments.py has the same structure.
#pragma once

#include "exponential.h"

#if !defined(__CUDACC_RTC__)
#include <cmath>
#endif

namespace braid {

struct CrossEntropyArguments {
  void* logits;            // [rows, size], rows `stride` apart; becomes the gradient
  const int64_t* targets;  // [rows]; negative: another process has it
  const float* weights;    // [rows]
  float* largest;          // [rows]: the largest logit
  double* total;           // [rows]: the sum of exp(logit - largest)
  float* at_target;        // [rows]: the target's logit, 0 where the target is elsewhere

  int64_t rows, size, stride;
  int64_t left_out;  // a token without probability; -1: none
  float z_loss;
  // Which half: `statistics` fills the three above, `gradient` reads them, those of all processes, and overwrites.
  int32_t statistics, gradient, bfloat16;
};

constexpr float LEAST = -0x1.fffffep+127f;

// The target's logit; NaN where no process has such a token.
template <class Logit>
BRAID_FUNCTION float logit_of_target(const CrossEntropyArguments& a, const Logit* logits, int64_t target) {
  if (target < 0) return 0.0f;
  if (target == a.left_out) return -infinity();
  return target < a.size ? load(logits + target) : from_bits(0x7FC00000u);
}

// What exp(logit - largest) is multiplied by: weight (1 + 2 z lse) / total.
BRAID_FUNCTION float gradient_scale(const CrossEntropyArguments& a, float weight, float largest, double total) {
  const double lse = a.z_loss ? (double)largest + log(total) : 0.0;
  return (float)(weight * (1 + 2 * a.z_loss * lse) / total);
}

}  // namespace braid
