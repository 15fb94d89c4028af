#include "sampling_host.h"

#include "host_words.h"

namespace braid {
namespace {

// The logits of one row, guided, without the token that is left out and what the nucleus does not keep (-inf).
template <class Logit>
struct Row {
  const SamplingArguments& a;
  const Logit *logits, *other;
  Nucleus nucleus = {no_logit(), -1};
  bool cut = false;

  BRAID_FUNCTION float at(int64_t token) const {
    return other ? add(multiply(a.guidance, load(logits + token)), multiply(a.rest, load(other + token)))
                 : load(logits + token);
  }
  BRAID_FUNCTION void read(int64_t start, float* __restrict tile) const {
    if (start + TILE <= a.size && !other) {
      for (int j = 0; j < TILE; ++j) tile[j] = load(logits + start + j);
    } else if (start + TILE <= a.size) {
      for (int j = 0; j < TILE; ++j)
        tile[j] = add(multiply(a.guidance, load(logits + start + j)), multiply(a.rest, load(other + start + j)));
    } else {
      for (int j = 0; j < TILE; ++j) tile[j] = start + j < a.size ? at(start + j) : no_logit();
    }
    finish(tile);
    if (a.left_out >= start && a.left_out < start + TILE) tile[a.left_out - start] = no_logit();
    if (cut)
      for (int j = 0; j < TILE; ++j) tile[j] = is_kept(nucleus, tile[j], start + j) ? tile[j] : no_logit();
  }
};

BRAID_FUNCTION float largest_of(const float* tile) {
  float lanes[16];
  for (int j = 0; j < 16; ++j) lanes[j] = tile[j];
  for (int k = 16; k < TILE; k += 16)
    for (int j = 0; j < 16; ++j) lanes[j] = tile[k + j] > lanes[j] ? tile[k + j] : lanes[j];
  float largest = lanes[0];
  for (int j = 1; j < 16; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
  return largest;
}

BRAID_FUNCTION bool is_bad(const float* tile) {  // NaN or +inf
  int bad = 0;
  for (int j = 0; j < TILE; ++j) bad |= !(tile[j] <= LARGEST);
  return bad;
}

struct Sum {
  float largest;
  double total;  // of exp((logit - largest) / temperature), to 1.2e-5
  bool bad;
};

template <class Logit>
Sum sum_row(const Row<Logit>& row) {
  Sum sum = {no_logit(), 0, false};
  const float inverse = (float)(1 / row.a.temperature);
  double lanes[16] = {};
  alignas(64) float tile[TILE];
  for (int64_t start = 0; start < row.a.size; start += TILE) {
    row.read(start, tile);
    if (is_bad(tile)) sum.bad = true;
    const float largest = largest_of(tile);
    if (largest > sum.largest) {
      const double shrink = exponential(((double)sum.largest - largest) / row.a.temperature);
      for (int j = 0; j < 16; ++j) lanes[j] *= shrink;
      sum.largest = largest;
    }
    if (sum.largest == no_logit()) continue;
    for (int j = 0; j < TILE; ++j) tile[j] = exponential((tile[j] - sum.largest) * inverse);
    finish(tile);
    for (int k = 0; k < TILE; k += 16)
      for (int j = 0; j < 16; ++j) lanes[j] += (double)tile[k + j];
  }
  for (int j = 0; j < 16; ++j) sum.total += lanes[j];
  return sum;
}

template <class Logit>
double exact_total(const Row<Logit>& row, const Law& law) {
  double lanes[16] = {};
  alignas(64) float tile[TILE];
  for (int64_t start = 0; start < row.a.size; start += TILE) {
    row.read(start, tile);
    for (int k = 0; k < TILE; k += 16)
      for (int j = 0; j < 16; ++j) lanes[j] += exponential((double)tile[k + j] / law.temperature - law.reference);
  }
  double total = 0;
  for (int j = 0; j < 16; ++j) total += lanes[j];
  return total;
}

// Finds the logit at which the mass from the largest down reaches top_p, eleven bits at a time; `total` becomes the
// mass of what is kept.
template <class Logit>
void cut_row(Row<Logit>& row, const Law& law, double& total) {
  uint64_t above = 0, last_mass = 0, bins[2048], masses[TILE];
  alignas(64) float tile[TILE];
  uint32_t prefix = 0;
  double target = 0;
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
    const int width = shift ? 11 : 10;
    for (int b = 0; b < 2048; ++b) bins[b] = 0;
    for (int64_t start = 0; start < row.a.size; start += TILE) {
      row.read(start, tile);
      if (shift == 21)
        for (int j = 0; j < TILE; ++j) masses[j] = mass_of(law, tile[j]);
      finish(masses);
      for (int j = 0; j < TILE; ++j) {
        const uint32_t order = sortable(tile[j]);
        if (shift < 21 && order >> (shift + width) != prefix) continue;
        bins[order >> shift & ((1u << width) - 1)] += shift == 21 ? masses[j] : mass_of(law, tile[j]);
      }
    }
    if (shift == 21) {
      uint64_t all = 0;
      for (int b = 0; b < 2048; ++b) all += bins[b];
      target = row.a.top_p * (double)all;
    }
    int lowest = 0, bin = -1;
    for (int b = (1 << width) - 1; b >= 0 && bin < 0; --b) {
      if (!bins[b]) continue;
      lowest = b;
      if ((double)(above + bins[b]) >= target) bin = b;
      else above += bins[b];
    }
    if (bin < 0) bin = lowest, above -= bins[bin];  // the target is all there is, but for rounding
    prefix = prefix << width | (uint32_t)bin;
    last_mass = bins[bin];
  }
  row.nucleus = end_of_nucleus(law, prefix, above, last_mass, target, total);
  int64_t keep = row.nucleus.last < 0 ? -row.nucleus.last : 0;  // of the equal logits at the end, the first ones
  for (int64_t start = 0; start < row.a.size && keep; start += TILE) {
    row.read(start, tile);
    for (int j = 0; j < TILE && keep; ++j)
      if (tile[j] == row.nucleus.threshold && --keep == 0) row.nucleus.last = start + j;
  }
  row.cut = true;
}

// All tokens but `noisy` (and, with a reverse step, the one that is left out) race. `moving`: the reference follows the
// largest logit so far, which then needs no pass of its own. False: some logit is NaN or +inf.
template <class Logit>
bool run(const Row<Logit>& row, const Draw& draw, Law law, float reference, bool moving, int64_t noisy, Race& race) {
  const SamplingArguments& a = row.a;
  const float inverse = (float)(1 / a.temperature), slope = (float)law.slope, floor = (float)law.floor;
  const float room = (float)(60 * a.temperature);
  float limit = limit_of(race);
  alignas(64) float tile[TILE], weights[TILE];
  alignas(64) uint32_t high[TILE];
  for (int j = 0; j < TILE; ++j) high[j] = 0xFFFFFFFFu;
  for (int64_t start = 0; start < a.size; start += TILE) {
    row.read(start, tile);
    if (!draw.greedy)
      word_tile(draw.position, STREAM_CATEGORICAL, (uint32_t)(start >> 2), draw.draw, draw.ordinal, draw.key, high);
    const float raise_above = moving ? reference + room : LARGEST;
    int look = 0;
    for (int j = 0; j < TILE; ++j) {
      weights[j] = slope * exponential((tile[j] - reference) * inverse) + floor;
      look |= !(to_float(high[j]) * 0x1p-32f > limit * weights[j]) | !(tile[j] <= raise_above);
    }
    if (!look) continue;
    if (is_bad(tile)) return false;
    const float largest = largest_of(tile);
    if (largest > raise_above || (moving && reference == no_logit())) {
      if (largest == no_logit()) continue;
      const double raised = (double)largest / a.temperature;
      race.time /= exponential(law.reference - raised);
      limit = limit_of(race);
      law.reference = raised;
      reference = largest;
      for (int j = 0; j < TILE; ++j) weights[j] = slope * exponential((tile[j] - reference) * inverse) + floor;
    }
    for (int j = 0; j < TILE && start + j < a.size; ++j) {
      if (to_float(high[j]) * 0x1p-32f > limit * weights[j]) continue;
      if (a.noisy && (start + j == noisy || start + j == a.left_out)) continue;
      enter(race, draw, start + j, high[j], weight(law, tile[j]));
      limit = limit_of(race);
    }
  }
  return true;
}

template <class Logit>
int64_t draw_row(const SamplingArguments& a, int64_t i) {
  const int64_t noisy = a.noisy ? a.noisy[i] : -1;
  if (a.noisy && arrival(a, noisy) == 0) return noisy;
  const int64_t from = (a.rows ? a.rows[i] : i) * a.logits_stride;
  Row<Logit> row = {a, (const Logit*)a.logits + from, a.other ? (const Logit*)a.other + from : nullptr};
  const Draw draw = draw_of(a, i);
  Race race = new_race();
  if (!a.noisy && a.top_p >= 1) {
    const Law law = {a.temperature, -NEVER, 1, 0};
    return run(row, draw, law, no_logit(), true, -1, race) ? race.token : -1;
  }

  const Sum sum = sum_row(row);
  if (sum.bad || sum.largest == no_logit()) return -1;
  Law law = {a.temperature, (double)sum.largest / a.temperature, 1, 0};
  double total = sum.total;
  bool exact = a.top_p < 1;
  if (exact) cut_row(row, law, total);
  if (!a.noisy) return run(row, draw, law, sum.largest, false, -1, race) ? race.token : -1;

  for (;; exact = true, total = exact_total(row, law)) {
    race = new_race();
    float logit = row.at(noisy);
    if (noisy == a.left_out || (row.cut && !is_kept(row.nucleus, logit, noisy))) logit = no_logit();
    enter_noisy(race, a, draw, noisy, logit, law.reference, total);
    run(row, draw, reverse_law(a, noisy, law.reference, total), sum.largest, false, noisy, race);
    if (exact || race.second > race.time * (1 + CLOSE)) return race.token;
  }
}

void draw(const SamplingArguments& a, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) a.tokens[i] = a.bfloat16 ? draw_row<bfloat16>(a, i) : draw_row<float>(a, i);
}

}  // namespace

namespace BRAID_ISA {
const HostSampling sampling = {draw};
}

}  // namespace braid
