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

RULE_FN double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// What becomes of the number that step() returns: subtracted from the parameter, or its new value; or the
// rule leaves the parameter alone.
enum class Outcome { subtracted, assigned, none };

// What a rule needs besides its states. One that says nothing of `uses` is an optimizer's.
struct Uses {
  bool parameter, gradient;
  Outcome outcome;
};

// What a rule may sum of the gradient before its step: see cpu/reduce.h.
enum class Along { none, rows, columns, both };

constexpr float infinity = __builtin_huge_valf();

// The larger of two numbers, the smaller one; NaN if either is. Without && or ||, which keep a loop scalar.
template <class T>
RULE_FN T larger(T a, T b) {
  return (a > b) | (a != a) ? a : b;
}

template <class T>
RULE_FN T smaller(T a, T b) {
  return (a < b) | (a != a) ? a : b;
}

// fp32's largest number stands for those beyond it; NaN stays.
RULE_FN float at_most_finite(double x) { return float(x > 0x1.fffffep127 ? 0x1.fffffep127 : x); }
RULE_FN float at_most_finite(float x) { return x > 0x1.fffffep127f ? 0x1.fffffep127f : x; }

}  // namespace DANLU_ISA
}  // namespace danlu
