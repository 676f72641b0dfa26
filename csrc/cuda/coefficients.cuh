// The numbers that a rule takes for one tensor in one step.
#pragma once
#include "../common/rule.h"
#include "../common/tensor_list.h"
#include "runtime.h"

namespace danlu {

template <class Rule>
struct Coefficients {
  CoefficientsHeader header;
  typename Rule::Coeffs k;
};

// A struct of fp32 numbers from memory that is aligned for one of them.
template <class T>
__device__ __forceinline__ T read_floats(const float* from) {
  constexpr int length = sizeof(T) / sizeof(float);
  float values[length];
#pragma unroll
  for (int i = 0; i < length; i++) values[i] = from[i];
  T read;
  __builtin_memcpy(&read, values, sizeof read);
  return read;
}

// clip: null, or multiplies every gradient
template <class Rule>
__device__ __forceinline__ Coefficients<Rule> coefficients_at(const float* from, const float* clip) {
  Coefficients<Rule> coefficients = read_floats<Coefficients<Rule>>(from);
  if (clip) coefficients.header.factor *= *clip;
  return coefficients;
}

}  // namespace danlu
