// The noise contract (kernels/random.py) for the host compiler, nvcc, NVRTC and the emulator of the tests: types,
// float32 arithmetic that is rounded after every operation, Philox, uniforms, normals, bfloat16.
//
// No standard header where NVRTC compiles this. Host code must be compiled with -ffp-contract=off; on a device the
// intrinsics below are never contracted.
#pragma once

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#include <cstring>
#endif

// Always inlined: host files are compiled once for each instruction set, and a shared out-of-line copy of a function
// could have been made for another one.
#if defined(__CUDACC__)
#define BRAID_FUNCTION __host__ __device__ __forceinline__
#else
#define BRAID_FUNCTION inline __attribute__((always_inline))
#endif

namespace braid {

// ---- float32, one rounding for each operation ---------------------------------------------------------------------

#if defined(__CUDA_ARCH__)
BRAID_FUNCTION float add(float a, float b) { return __fadd_rn(a, b); }
BRAID_FUNCTION float multiply(float a, float b) { return __fmul_rn(a, b); }
BRAID_FUNCTION float to_float(uint32_t a) { return __uint2float_rn(a); }
BRAID_FUNCTION uint32_t bits_of(float a) { return __float_as_uint(a); }
BRAID_FUNCTION float from_bits(uint32_t a) { return __uint_as_float(a); }
BRAID_FUNCTION uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
#else
BRAID_FUNCTION float add(float a, float b) { return a + b; }
BRAID_FUNCTION float multiply(float a, float b) { return a * b; }
BRAID_FUNCTION float to_float(uint32_t a) { return (float)a; }
BRAID_FUNCTION uint32_t bits_of(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, 4);
  return bits;
}
BRAID_FUNCTION float from_bits(uint32_t a) {
  float number;
  __builtin_memcpy(&number, &a, 4);
  return number;
}
BRAID_FUNCTION uint32_t multiply_high(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
#endif

// ---- bfloat16 -----------------------------------------------------------------------------------------------------

struct bfloat16 {
  uint16_t bits;
};

// To nearest, ties to even; any NaN becomes one quiet NaN.
BRAID_FUNCTION bfloat16 to_bfloat16(float a) {
  const uint32_t bits = bits_of(a);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return {(uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}
BRAID_FUNCTION float load(const float* from) { return *from; }
BRAID_FUNCTION float load(const bfloat16* from) { return from_bits((uint32_t)from->bits << 16); }
BRAID_FUNCTION void store(float* to, float a) { *to = a; }
BRAID_FUNCTION void store(bfloat16* to, float a) { *to = to_bfloat16(a); }

// ---- Philox4x32-10 ------------------------------------------------------------------------------------------------

// Streams of the contract; the numbers of `Stream` in reference.py.
constexpr uint32_t STREAM_TOKEN = 1, STREAM_NORMAL = 2, STREAM_CATEGORICAL = 4;

constexpr uint32_t MULTIPLIER_0 = 0xD2511F53u, MULTIPLIER_1 = 0xCD9E8D57u;
constexpr uint32_t INCREMENT_0 = 0x9E3779B9u, INCREMENT_1 = 0xBB67AE85u;
constexpr int NUM_ROUNDS = 10;

struct Key {
  uint32_t low, high;
};
// The key in memory, or the one given where there is none in memory.
BRAID_FUNCTION Key read_key(const int64_t* in_memory, int64_t given) {
  const uint64_t key = (uint64_t)(in_memory ? *in_memory : given);
  return {(uint32_t)key, (uint32_t)(key >> 32)};
}

struct Words {
  uint32_t w0, w1, w2, w3;
};

BRAID_FUNCTION uint32_t counter_word(uint32_t stream, uint32_t draw, uint32_t block) {
  return stream << 24 | draw << 16 | block;
}

BRAID_FUNCTION Words philox(uint32_t position, uint32_t word, int64_t ordinal, Key key) {
  Words c = {position, word, (uint32_t)ordinal, (uint32_t)((uint64_t)ordinal >> 32)};
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < NUM_ROUNDS; ++round) {
    const uint32_t high0 = multiply_high(MULTIPLIER_0, c.w0), low0 = MULTIPLIER_0 * c.w0;
    const uint32_t high1 = multiply_high(MULTIPLIER_1, c.w2), low1 = MULTIPLIER_1 * c.w2;
    c = {high1 ^ c.w1 ^ key.low, low1, high0 ^ c.w3 ^ key.high, low0};
    key.low += INCREMENT_0;
    key.high += INCREMENT_1;
  }
  return c;
}

BRAID_FUNCTION uint32_t word_of(const Words& words, int which) {
  return which == 0 ? words.w0 : which == 1 ? words.w1 : which == 2 ? words.w2 : words.w3;
}

// ---- numbers from words -------------------------------------------------------------------------------------------

BRAID_FUNCTION float to_uniform(uint32_t word) { return multiply(to_float(word >> 8), 0x1p-24f); }

constexpr int NUM_SEGMENTS = (32 << 6) + 1;

struct Segment {
  float offset, slope;
};

// The magnitude is a line within the segment; the top bit of the word is the sign.
BRAID_FUNCTION float normal_argument(uint32_t word) { return to_float(word << 1 | 1u); }
BRAID_FUNCTION uint32_t segment_of(float x) { return (bits_of(x) >> 17) - (127u << 6); }
BRAID_FUNCTION float to_normal(uint32_t word, float x, float offset, float slope) {
  return from_bits(bits_of(add(offset, multiply(slope, x))) ^ (word & 0x80000000u));
}

}  // namespace braid
