// Normals on the host, 64 channels at a time.
#pragma once

#include "host_words.h"
#include "normal_table.h"

namespace braid {
namespace {

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

// The normals of channels 4 * first_block to 4 * first_block + TILE.
BRAID_FUNCTION void normal_tile(uint32_t position, uint32_t first_block, uint32_t draw, int64_t ordinal, Key key,
                                float* normals) {
  alignas(BYTES) uint32_t words[TILE];
  word_tile(position, STREAM_NORMAL, first_block, draw, ordinal, key, words);
  for (int i = 0; i < TILE; i += LANES) {
    Unsigned of_vector;
    __builtin_memcpy(&of_vector, words + i, BYTES);
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
