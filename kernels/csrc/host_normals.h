// Normals on the host, 64 channels at a time, written so that compilers turn every loop into vector instructions.
#pragma once

#include "normal_table.h"

namespace braid {
namespace {

constexpr int TILE_BLOCKS = 16;
constexpr int TILE = 4 * TILE_BLOCKS;

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

// Makes the compiler finish one loop before the next: merged ones are no longer vectorised.
BRAID_FUNCTION void finish(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// The normals of channels 4 * first_block to 4 * first_block + TILE.
BRAID_FUNCTION void normal_tile(uint32_t position, uint32_t first_block, uint32_t draw, int64_t ordinal, Key key,
                                float* __restrict normals) {
  uint32_t c0[TILE_BLOCKS], c1[TILE_BLOCKS], c2[TILE_BLOCKS], c3[TILE_BLOCKS];
  const uint32_t ordinal_low = (uint32_t)ordinal, ordinal_high = (uint32_t)((uint64_t)ordinal >> 32);
  for (int i = 0; i < TILE_BLOCKS; ++i) {
    c0[i] = position;
    // Blocks past the last one belong to channels nobody asks for.
    c1[i] = counter_word(STREAM_NORMAL, draw, (first_block + i) & 0xFFFFu);
    c2[i] = ordinal_low;
    c3[i] = ordinal_high;
  }
  for (int round = 0; round < NUM_ROUNDS; ++round) {
    for (int i = 0; i < TILE_BLOCKS; ++i) {
      const uint64_t p0 = (uint64_t)MULTIPLIER_0 * c0[i], p1 = (uint64_t)MULTIPLIER_1 * c2[i];
      const uint32_t mixed0 = (uint32_t)(p1 >> 32) ^ c1[i] ^ key.low, mixed2 = (uint32_t)(p0 >> 32) ^ c3[i] ^ key.high;
      c0[i] = mixed0;
      c1[i] = (uint32_t)p1;
      c2[i] = mixed2;
      c3[i] = (uint32_t)p0;
    }
    key.low += INCREMENT_0;
    key.high += INCREMENT_1;
  }
  uint32_t words[TILE];
  for (int i = 0; i < TILE_BLOCKS; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
  finish(words);
  for (int i = 0; i < TILE; ++i) {
    const float x = normal_argument(words[i]);
    const uint32_t segment = segment_of(x);
    normals[i] = to_normal(words[i], x, SEGMENTS.offset[segment], SEGMENTS.slope[segment]);
  }
  finish(normals);
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
