// Philox on the host, 32 blocks at a time, written so that compilers turn every loop into vector instructions.
#pragma once

#include "core.h"

namespace braid {
namespace {

constexpr int TILE_BLOCKS = 32;
constexpr int TILE = 4 * TILE_BLOCKS;

// Makes the compiler finish one loop before the next: merged ones are no longer vectorised.
BRAID_FUNCTION void finish(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// The words of blocks first_block to first_block + TILE_BLOCKS.
BRAID_FUNCTION void word_tile(uint32_t position, uint32_t stream, uint32_t first_block, uint32_t draw, int64_t ordinal,
                              Key key, uint32_t* __restrict words) {
  uint32_t c0[TILE_BLOCKS], c1[TILE_BLOCKS], c2[TILE_BLOCKS], c3[TILE_BLOCKS];
  const uint32_t ordinal_low = (uint32_t)ordinal, ordinal_high = (uint32_t)((uint64_t)ordinal >> 32);
  for (int i = 0; i < TILE_BLOCKS; ++i) {
    c0[i] = position;
    // Blocks past the last one belong to channels or tokens nobody asks for.
    c1[i] = counter_word(stream, draw, (first_block + i) & 0xFFFFu);
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
  for (int i = 0; i < TILE_BLOCKS; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
  finish(words);
}

}  // namespace
}  // namespace braid
