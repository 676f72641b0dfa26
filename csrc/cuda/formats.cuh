// What all kernels have in common: storage formats, coefficients.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "../common/rule.h"
#include "../common/tensor_list.h"
#include "storage.cuh"

namespace danlu {

// Storage formats of parameter, gradient and first moment; second moments are fp32.
template <class P_, class G_, class M_>
struct Formats {
  using P = P_;
  using G = G_;
  using M = M_;
};

template <class T>
constexpr Dtype dtype_of = std::is_same_v<T, float>  ? Dtype::f32
                           : std::is_same_v<T, bf16> ? Dtype::bf16
                                                     : Dtype::f16;

// Elements that a thread takes at once, of arrays whose elements have so many bytes: a pack of the widest.
// Neighbouring lanes then leave no gaps in any array, and every access of a warp has whole sectors.
constexpr int pack_width(std::initializer_list<size_t> sizes) {
  size_t widest = 0;
  for (const size_t size : sizes) widest = size > widest ? size : widest;
  return int(pack_bytes / widest);
}

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
