// exp of our own, in products and sums alone: loops of it become vector instructions, and every compiler and device
// gives the same bits where nothing is contracted (float64) or is close (float32 on a device, which may use fma).
#pragma once

#include "core.h"

namespace braid {

BRAID_FUNCTION float infinity() { return from_bits(0x7F800000u); }

// float32: relative error below 1.5e-7 from -87 to 88; 0 below, exp(88) above; NaN gives NaN.
BRAID_FUNCTION float exponential(float argument) {
  const float x = argument < -87.0f ? -87.0f : argument > 88.0f ? 88.0f : argument;
  const float shifted = x * 0x1.715476p+0f + 0x1.8p+23f;  // the nearest multiple of ln 2 in its lowest bits
  const float number = shifted - 0x1.8p+23f;
  const float r = (x - number * 0x1.62e4p-1f) - number * 0x1.7f7d1cp-20f;  // ln 2 in two parts, the first product exact
  float p = 0x1.6ab96ep-10f;
  p = p * r + 0x1.126d1ep-7f;
  p = p * r + 0x1.55589ap-5f;
  p = p * r + 0x1.55540ap-3f;
  p = p * r + 0x1.fffffap-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float value = p * from_bits((bits_of(shifted) << 23) + 0x3F800000u);
  return argument < -87.0f ? 0.0f : value;
}

#if defined(__CUDA_ARCH__)
BRAID_FUNCTION double add(double a, double b) { return __dadd_rn(a, b); }
BRAID_FUNCTION double multiply(double a, double b) { return __dmul_rn(a, b); }
BRAID_FUNCTION uint64_t bits_of(double a) { return (uint64_t)__double_as_longlong(a); }
BRAID_FUNCTION double from_bits(uint64_t a) { return __longlong_as_double((long long)a); }
#else
BRAID_FUNCTION double add(double a, double b) { return a + b; }
BRAID_FUNCTION double multiply(double a, double b) { return a * b; }
BRAID_FUNCTION uint64_t bits_of(double a) {
  uint64_t bits;
  __builtin_memcpy(&bits, &a, 8);
  return bits;
}
BRAID_FUNCTION double from_bits(uint64_t a) {
  double number;
  __builtin_memcpy(&number, &a, 8);
  return number;
}
#endif

// float64: relative error below 4e-16 from -708 to 709; 0 below, exp(709) above.
BRAID_FUNCTION double exponential(double x) {
  const double at = x < -708.0 ? -708.0 : x > 709.0 ? 709.0 : x;
  const double shifted = add(multiply(at, 0x1.71547652b82fep+0), 0x1.8p+52);
  const double number = add(shifted, -0x1.8p+52);
  const double r = add(add(at, -multiply(number, 0x1.62e42fefap-1)), -multiply(number, 0x1.cf79abc9e3b3ap-40));
  double p = 1.0 / 6227020800;  // Taylor to the thirteenth power, |r| <= ln 2 / 2
  p = add(multiply(p, r), 1.0 / 479001600);
  p = add(multiply(p, r), 1.0 / 39916800);
  p = add(multiply(p, r), 1.0 / 3628800);
  p = add(multiply(p, r), 1.0 / 362880);
  p = add(multiply(p, r), 1.0 / 40320);
  p = add(multiply(p, r), 1.0 / 5040);
  p = add(multiply(p, r), 1.0 / 720);
  p = add(multiply(p, r), 1.0 / 120);
  p = add(multiply(p, r), 1.0 / 24);
  p = add(multiply(p, r), 1.0 / 6);
  p = add(multiply(p, r), 0.5);
  p = add(multiply(p, r), 1.0);
  p = add(multiply(p, r), 1.0);
  const double value = multiply(p, from_bits((bits_of(shifted) << 52) + (uint64_t)0x3FF0000000000000ull));
  return x < -708.0 ? 0.0 : value;
}

}  // namespace braid
