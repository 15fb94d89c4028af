// Normals on the host, 64 channels at a time.
#pragma once

#include "host_vectors.h"
#include "normal_table.h"

namespace braid {
namespace {

constexpr int TILE = 64;
constexpr int TILE_VECTORS = TILE / 4 / WIDE_LANES;

// Offsets and slopes apart: each is gathered by itself.
struct SplitTable {
  float offset[NUM_SEGMENTS], slope[NUM_SEGMENTS];
};
constexpr SplitTable split_table() {
  SplitTable table = {};
  for (int i = 0; i < NUM_SEGMENTS; ++i) table.offset[i] = NORMAL_TABLE[i].offset, table.slope[i] = NORMAL_TABLE[i].slope;
  return table;
}
constexpr SplitTable SEGMENTS = split_table();

// core.h's normal_argument, segment_of and to_normal, for a vector of words.
BRAID_FUNCTION Floats to_normals(Unsigned words) {
  const Floats x = to_floats(words << 1 | 1u);
  const Signed segment = (Signed)(((Unsigned)x >> 17) - (127u << 6));
  const Floats magnitude = gather(SEGMENTS.offset, segment) + gather(SEGMENTS.slope, segment) * x;
  return (Floats)((Unsigned)magnitude ^ (words & 0x80000000u));
}

// The normals of channels 4 * first_block to 4 * first_block + TILE. Counter words are the lower halves of 64-bit
// lanes, one lane to a block; what is in the upper halves does not reach the lower ones.
BRAID_FUNCTION void normal_tile(uint32_t position, uint32_t first_block, uint32_t draw, int64_t ordinal, Key key,
                                float* normals) {
  Wide c0[TILE_VECTORS], c1[TILE_VECTORS], c2[TILE_VECTORS], c3[TILE_VECTORS];
  for (int v = 0; v < TILE_VECTORS; ++v) {
    // Blocks past the last one belong to channels nobody asks for.
    for (int i = 0; i < WIDE_LANES; ++i)
      c1[v][i] = counter_word(STREAM_NORMAL, draw, (first_block + v * WIDE_LANES + i) & 0xFFFFu);
    c0[v] = Wide{} + (uint64_t)position;
    c2[v] = Wide{} + (uint64_t)(uint32_t)ordinal;
    c3[v] = Wide{} + ((uint64_t)ordinal >> 32);
  }
  for (int round = 0; round < NUM_ROUNDS; ++round) {
    for (int v = 0; v < TILE_VECTORS; ++v) {
      const Wide p0 = multiply_lower(c0[v], MULTIPLIER_0), p1 = multiply_lower(c2[v], MULTIPLIER_1);
      c0[v] = p1 >> 32 ^ c1[v] ^ (uint64_t)key.low;
      c2[v] = p0 >> 32 ^ c3[v] ^ (uint64_t)key.high;
      c1[v] = p1;
      c3[v] = p0;
    }
    key.low += INCREMENT_0;
    key.high += INCREMENT_1;
  }
  alignas(BYTES) uint64_t words[TILE / 2];
  for (int v = 0; v < TILE_VECTORS; ++v) {
    const Wide first = (c0[v] & 0xFFFFFFFFu) | c1[v] << 32, second = (c2[v] & 0xFFFFFFFFu) | c3[v] << 32;
    for (int i = 0; i < WIDE_LANES; ++i) {
      words[2 * (v * WIDE_LANES + i)] = first[i];
      words[2 * (v * WIDE_LANES + i) + 1] = second[i];
    }
  }
  for (int i = 0; i < TILE; i += LANES) {
    Unsigned of_vector;
    __builtin_memcpy(&of_vector, (const char*)words + 4 * i, BYTES);
    const Floats made = to_normals(of_vector);
    __builtin_memcpy(normals + i, &made, BYTES);
  }
}

// Calls use(channel, normals, number) for pieces of at most TILE consecutive channels of one position: channel counts
// from `first_channel`, which may lie anywhere within a block.
template <class Use>
BRAID_FUNCTION void for_normals(uint32_t position, int64_t first_channel, int64_t channels, uint32_t draw,
                                int64_t ordinal, Key key, const Use& use) {
  alignas(64) float normals[TILE];
  const int64_t skipped = first_channel % 4;
  for (int64_t start = 0; start < skipped + channels; start += TILE) {
    normal_tile(position, (uint32_t)((first_channel - skipped + start) / 4), draw, ordinal, key, normals);
    const int64_t first = start ? start : skipped;
    const int64_t last = start + TILE < skipped + channels ? start + TILE : skipped + channels;
    use(first - skipped, normals + (first - start), last - first);
  }
}

}  // namespace
}  // namespace braid
