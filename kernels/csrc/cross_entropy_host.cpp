#include "cross_entropy_host.h"

#include "host_words.h"

namespace braid {
namespace {

constexpr int SUMS = 16;  // partial sums: a fixed order on every instruction set

template <class Logit>
void statistics(const CrossEntropyArguments& a, int64_t row) {
  const Logit* logits = (const Logit*)a.logits + row * a.stride;
  float largest = LEAST;
  double lanes[SUMS] = {};
  alignas(64) float tile[TILE];
  for (int64_t start = 0; start < a.size; start += TILE) {
    if (start + TILE <= a.size) {
      for (int j = 0; j < TILE; ++j) tile[j] = load(logits + start + j);
    } else {
      for (int j = 0; j < TILE; ++j) tile[j] = start + j < a.size ? load(logits + start + j) : -infinity();
    }
    finish(tile);
    if (a.left_out >= start && a.left_out < start + TILE) tile[a.left_out - start] = -infinity();
    float highest[SUMS];
    for (int j = 0; j < SUMS; ++j) highest[j] = tile[j];
    for (int k = SUMS; k < TILE; k += SUMS)
      for (int j = 0; j < SUMS; ++j) highest[j] = tile[k + j] > highest[j] ? tile[k + j] : highest[j];
    for (int j = 1; j < SUMS; ++j) highest[0] = highest[j] > highest[0] ? highest[j] : highest[0];
    if (highest[0] > largest) {
      const double shrink = exponential((double)largest - highest[0]);
      for (int j = 0; j < SUMS; ++j) lanes[j] *= shrink;
      largest = highest[0];
    }
    for (int j = 0; j < TILE; ++j) tile[j] = exponential(tile[j] - largest);
    finish(tile);
    for (int k = 0; k < TILE; k += SUMS)
      for (int j = 0; j < SUMS; ++j) lanes[j] += (double)tile[k + j];
  }
  double total = 0;
  for (int j = 0; j < SUMS; ++j) total += lanes[j];
  a.largest[row] = largest;
  a.total[row] = total;
  a.at_target[row] = logit_of_target(a, logits, a.targets[row]);
}

template <class Logit>
void gradient(const CrossEntropyArguments& a, int64_t row) {
  Logit* __restrict logits = (Logit*)a.logits + row * a.stride;
  const float weight = a.weights[row], largest = a.largest[row];
  if (weight == 0) {
    for (int64_t j = 0; j < a.size; ++j) store(logits + j, 0.0f);
    return;
  }
  const float scale = gradient_scale(a, weight, largest, a.total[row]);
  const int64_t target = a.targets[row];
  const bool here = target >= 0 && target < a.size;
  const float at_target = here ? scale * exponential(load(logits + target) - largest) - weight : 0.0f;
  for (int64_t j = 0; j < a.size; ++j) store(logits + j, scale * exponential(load(logits + j) - largest));
  if (here) store(logits + target, at_target);
  if (a.left_out >= 0) store(logits + a.left_out, target == a.left_out ? -weight : 0.0f);
}

template <class Logit>
void rows(const CrossEntropyArguments& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    if (a.statistics) statistics<Logit>(a, row);
    if (a.gradient) gradient<Logit>(a, row);
  }
}

void rows_any(const CrossEntropyArguments& a, int64_t first, int64_t last) {
  return a.bfloat16 ? rows<bfloat16>(a, first, last) : rows<float>(a, first, last);
}

}  // namespace

namespace BRAID_ISA {
const HostCrossEntropy cross_entropy = {rows_any};
}

}  // namespace braid
