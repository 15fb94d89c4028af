// Philox on the host, 16 blocks at a time.
#pragma once

#include "host_vectors.h"

namespace braid {
namespace {

constexpr int TILE = 64;
constexpr int TILE_VECTORS = TILE / 4 / WIDE_LANES;

// Makes the compiler finish one loop before the next: merged ones are not turned into vector instructions.
BRAID_FUNCTION void finish(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// The words of blocks first_block to first_block + TILE / 4. Counter words are the lower halves of 64-bit lanes, one lane
// to a block; what is in the upper halves does not reach the lower ones.
BRAID_FUNCTION void word_tile(uint32_t position, uint32_t stream, uint32_t first_block, uint32_t draw, int64_t ordinal,
                              Key key, uint32_t* words) {
  Wide c0[TILE_VECTORS], c1[TILE_VECTORS], c2[TILE_VECTORS], c3[TILE_VECTORS];
  for (int v = 0; v < TILE_VECTORS; ++v) {
    // Blocks past the last one belong to channels or tokens nobody asks for.
    for (int i = 0; i < WIDE_LANES; ++i)
      c1[v][i] = counter_word(stream, draw, (first_block + v * WIDE_LANES + i) & 0xFFFFu);
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
  alignas(BYTES) uint64_t pairs[TILE / 2];
  for (int v = 0; v < TILE_VECTORS; ++v) {
    const Wide first = (c0[v] & 0xFFFFFFFFu) | c1[v] << 32, second = (c2[v] & 0xFFFFFFFFu) | c3[v] << 32;
    for (int i = 0; i < WIDE_LANES; ++i) {
      pairs[2 * (v * WIDE_LANES + i)] = first[i];
      pairs[2 * (v * WIDE_LANES + i) + 1] = second[i];
    }
  }
  __builtin_memcpy(words, pairs, sizeof pairs);
}

}  // namespace
}  // namespace braid
