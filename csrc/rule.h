// The vocabulary of rules: what a formula may use besides + - * /.
#pragma once
#include "types.h"

// DANLU_ISA is the namespace of one compilation. Two files compiled for different instruction sets must not
// share an inline symbol: the linker keeps one body, perhaps the one that the machine cannot run.
#ifndef DANLU_ISA
#define DANLU_ISA rules
#endif

// Declares the coefficients together with the names that Python must deliver, in this order.
#define COEFFS(...)    \
  struct Coeffs {      \
    float __VA_ARGS__; \
  };                   \
  static constexpr const char* coeff_names = #__VA_ARGS__

namespace danlu {
namespace DANLU_ISA {

// 1 or -1, +0 at either zero, NaN for NaN; by bits, which takes fewer operations than comparisons
RULE_FN float sign(float x) {
  const float one = as_float((as_bits(x) & 0x80000000u) | 0x3f800000u);
  const float moved = x != 0.f ? one : 0.f;
  return x == x ? moved : x;
}

RULE_FN float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

}  // namespace DANLU_ISA
}  // namespace danlu
