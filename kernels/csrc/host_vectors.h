// Vectors of the instruction set that a host file is compiled for: GCC's and Clang's vector types, and intrinsics for the
// three operations that those do not turn into one instruction.
#pragma once

#include "core.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace braid {
namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int WIDE_LANES = BYTES / 8, LANES = BYTES / 4;

typedef uint64_t Wide __attribute__((vector_size(BYTES)));
typedef uint32_t Unsigned __attribute__((vector_size(BYTES)));
typedef int32_t Signed __attribute__((vector_size(BYTES)));
typedef float Floats __attribute__((vector_size(BYTES)));

// The lower halves of a, multiplied: 64-bit products.
BRAID_FUNCTION Wide multiply_lower(Wide a, uint32_t by) {
#if defined(__AVX512F__)
  return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(by));
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(by));
#elif defined(__SSE2__)
  return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(by));
#else
  return (a & 0xFFFFFFFFu) * (uint64_t)by;
#endif
}

// To nearest, as one conversion: both halves are exact, and their sum is rounded once.
BRAID_FUNCTION Floats to_floats(Unsigned a) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepu32_ps((__m512i)a);
#else
  const Floats upper = __builtin_convertvector((Signed)(a >> 16), Floats);
  const Floats lower = __builtin_convertvector((Signed)(a & 0xFFFFu), Floats);
  return upper * 65536.0f + lower;
#endif
}

BRAID_FUNCTION Floats gather(const float* from, Signed index) {
#if defined(__AVX512F__)
  return (Floats)_mm512_i32gather_ps((__m512i)index, from, 4);
#elif defined(__AVX2__)
  return (Floats)_mm256_i32gather_ps(from, (__m256i)index, 4);
#else
  Floats gathered;
  for (int i = 0; i < LANES; ++i) gathered[i] = from[index[i]];
  return gathered;
#endif
}

}  // namespace
}  // namespace braid
