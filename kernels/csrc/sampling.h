// Exact draws of tokens from logits (kernels/sampling.py says what is drawn): the arguments, for the host and for CUDA,
// and the decisions that both take in the same way. kernels/sampling_arguments.py has the same structure; a pointer that
// is null means "not asked for".
//
// The race: token i finishes at E_i / w_i, E_i = -log(1 - v_i) from a 64-bit uniform v_i, and the least time wins. One
// pass over the logits keeps the best time so far and looks at a token in float64, with all of its 64 bits, only if it
// may beat that. It cannot if h_i > time * w_i, h_i being the upper 32 bits of v_i, as E_i >= v_i >= h_i: one float32
// exponential and one comparison, with room (SLACK) for all float32 errors, which stay below 2^-14: the difference of
// two logits is off by at most 2^-24 of itself, and one below -87 temperatures cannot win.
#pragma once

#include "exponential.h"

#if !defined(__CUDACC_RTC__)
#include <cmath>
#endif

namespace braid {

struct SamplingArguments {
  const void* logits;        // [all rows, size], rows logits_stride apart
  const void* other;         // of the same shape; what is drawn from is guidance * logits + rest * other, in float32
  const int64_t* rows;       // [count]: which rows to draw from; null: the first `count`
  const int64_t* ordinals;   // [count]
  const int64_t* positions;  // [count]
  const int64_t* noisy;      // [count]: x_t, where the draw is from the reverse step of a process
  int64_t* tokens;           // [count]: what is drawn; -1: the row has no distribution

  int64_t key, count, size, logits_stride;
  int64_t left_out;  // a token that no clean text has; -1: none
  double temperature, top_p;
  // The reverse step. With w = survival p + noise, and w = mask at `left_out`: weights w arrives for every token, and
  // w stays on top of that for x_t. `arrives` has one value for x_t = left_out and one for all others.
  double survival, noise, mask, stays, arrives_at_mask, arrives;
  float guidance, rest;
  int32_t draw, greedy, bfloat16;
};

constexpr uint64_t LOW_WORDS = 0xB5A3F68805790A45;
constexpr double CLOSE = 0x1p-14;  // closer than this, a decision is taken again from float64 sums
constexpr double SLACK = 1 + 0x1p-11;
constexpr float LARGEST = 0x1.fffffep+127f;
BRAID_FUNCTION float no_logit() { return -infinity(); }
constexpr double NEVER = 1e300;

// What the weights of a row's tokens are: slope * exp(logit / temperature - reference) + floor.
struct Law {
  double temperature, reference, slope, floor;
};
BRAID_FUNCTION double weight(const Law& law, float logit) {
  return add(multiply(law.slope, exponential(add((double)logit / law.temperature, -law.reference))), law.floor);
}

struct Draw {
  Key key, low_key;
  uint32_t position, draw;
  int64_t ordinal;
  bool greedy;
};
BRAID_FUNCTION Draw draw_of(const SamplingArguments& a, int64_t i) {
  const Key key = read_key(nullptr, a.key);
  // fold_key(key, "categorical: low words"): the hash of that text, 1 for a text, and FOLD_TAG make up the counter.
  const Words low = philox((uint32_t)LOW_WORDS, (uint32_t)(LOW_WORDS >> 32), 0x6272616900000001, key);
  return {key, {low.w0, low.w1}, (uint32_t)a.positions[i], (uint32_t)a.draw, a.ordinals[i], a.greedy != 0};
}

// -log(1 - v), taken from the nearer end so that no digit is lost.
BRAID_FUNCTION double race_time(uint32_t high, uint32_t low) {
  const bool upper = high >> 31;
  const double nearer = ((double)(upper ? ~high : high) * 0x1p32 + (double)(upper ? ~low : low) + 0.5) * 0x1p-64;
  return upper ? -log(nearer) : -log1p(-nearer);
}

struct Race {
  double time, second;  // the best time and the one after it
  int64_t token;        // whose the best is; -1: nobody's
};
BRAID_FUNCTION Race new_race() { return {NEVER, NEVER, -1}; }

BRAID_FUNCTION void finish_at(Race& race, double time, int64_t token) {
  if (time < race.time || (time == race.time && token < race.token)) {
    race.second = race.time;
    race.time = time;
    race.token = token;
  } else if (time < race.second) {
    race.second = time;
  }
}

BRAID_FUNCTION void merge(Race& race, const Race& other) {
  if (other.token < 0) return;
  finish_at(race, other.time, other.token);
  if (other.second < race.second) race.second = other.second;
}

// Token enters the race with this weight; `high` is its upper word.
BRAID_FUNCTION void enter(Race& race, const Draw& draw, int64_t token, uint32_t high, double weight) {
  if (!(weight > 0)) return;
  double time = 1;
  if (!draw.greedy) {
    if (high * 0x1p-32 > race.time * weight * SLACK) return;
    const uint32_t word = counter_word(STREAM_CATEGORICAL, draw.draw, (uint32_t)(token >> 2));
    const Words low = philox(draw.position, word, draw.ordinal, draw.low_key);
    time = race_time(high, word_of(low, (int)(token & 3)));
  }
  finish_at(race, time / weight, token);
}
BRAID_FUNCTION uint32_t upper_word(const Draw& draw, int64_t token) {
  const uint32_t word = counter_word(STREAM_CATEGORICAL, draw.draw, (uint32_t)(token >> 2));
  return word_of(philox(draw.position, word, draw.ordinal, draw.key), (int)(token & 3));
}

// Below this, a token with weight 1 may still win.
BRAID_FUNCTION float limit_of(const Race& race) {
  const double limit = race.time * SLACK;
  return limit < 1e30 ? (float)limit : 1e30f;
}

// The reverse step where x_t is `noisy`, over all other tokens but `left_out`; these two enter by themselves.
BRAID_FUNCTION double arrival(const SamplingArguments& a, int64_t noisy) {
  return noisy == a.left_out ? a.arrives_at_mask : a.arrives;
}
BRAID_FUNCTION Law reverse_law(const SamplingArguments& a, int64_t noisy, double reference, double total) {
  const double arrives = arrival(a, noisy);
  return {a.temperature, reference, a.survival / total * arrives, a.noise * arrives};
}
BRAID_FUNCTION double noisy_weight(const SamplingArguments& a, int64_t noisy, float logit, double reference,
                                   double total) {
  if (noisy == a.left_out) return a.mask * (arrival(a, noisy) + a.stays);
  const Law clean = {a.temperature, reference, a.survival / total, a.noise};
  return weight(reverse_law(a, noisy, reference, total), logit) + a.stays * weight(clean, logit);
}

// x_t and the token that is left out enter first: their weights are their own.
BRAID_FUNCTION void enter_noisy(Race& race, const SamplingArguments& a, const Draw& draw, int64_t noisy, float logit,
                                double reference, double total) {
  enter(race, draw, noisy, upper_word(draw, noisy), noisy_weight(a, noisy, logit, reference, total));
  if (a.left_out >= 0 && a.left_out != noisy)
    enter(race, draw, a.left_out, upper_word(draw, a.left_out), a.mask * arrival(a, noisy));
}

// ---- the nucleus --------------------------------------------------------------------------------------------------

// Logits in the order of unsigned integers, -0 as 0.
BRAID_FUNCTION uint32_t sortable(float logit) {
  const uint32_t bits = bits_of(logit + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
BRAID_FUNCTION float from_sortable(uint32_t order) {
  return from_bits(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

// exp(logit / temperature - reference) <= 1 in units of 2^-44: sums of integers do not depend on their order.
BRAID_FUNCTION uint64_t mass_of(const Law& law, float logit) {
  const double mass = exponential(add((double)logit / law.temperature, -law.reference));
  return bits_of(add(multiply(mass, 0x1p44), 0x1p52)) & 0xFFFFFFFFFFFFFull;
}
constexpr double MASS_UNIT = 0x1p-44;

// Kept are logits above `threshold`, and those equal to it up to the token `last`.
struct Nucleus {
  float threshold;
  int64_t last;
};
// `above`: the mass of larger logits than the one with this order, `last_mass`: of those equal to it, together; `target`:
// the mass to reach. `total` becomes what is kept. A negative `last`: as many of the equal ones.
BRAID_FUNCTION Nucleus end_of_nucleus(const Law& law, uint32_t order, uint64_t above, uint64_t last_mass, double target,
                                      double& total) {
  const float threshold = from_sortable(order);
  const uint64_t mass = mass_of(law, threshold);
  uint64_t keep = 1;
  while (keep * mass < last_mass && (double)(above + keep * mass) < target) ++keep;
  total = (double)(above + keep * mass) * MASS_UNIT;
  return {threshold, keep * mass < last_mass ? -(int64_t)keep : (int64_t)1 << 62};
}
BRAID_FUNCTION bool is_kept(const Nucleus& nucleus, float logit, int64_t token) {
  return logit > nucleus.threshold || (logit == nucleus.threshold && token <= nucleus.last);
}

}  // namespace braid
