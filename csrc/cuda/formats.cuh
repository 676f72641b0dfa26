// What all kernels have in common: storage formats, coefficient rows.
#pragma once
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

// Elements that a thread takes at once: 16 bytes of the narrowest format.
template <class F>
struct Packs {
  static constexpr int width =
      sizeof(typename F::P) + sizeof(typename F::G) + sizeof(typename F::M) < 12 ? 8 : 4;
};

template <class Rule>
struct Row {
  RowHeader header;
  typename Rule::Coeffs k;
};

// clip: null, or multiplies every gradient
template <class Rule>
__device__ __forceinline__ Row<Rule> row_at(const float* from, const float* clip) {
  constexpr int length = sizeof(Row<Rule>) / sizeof(float);
  float values[length];
#pragma unroll
  for (int i = 0; i < length; i++) values[i] = from[i];
  Row<Rule> row;
  __builtin_memcpy(&row, values, sizeof row);
  if (clip) row.header.factor *= *clip;
  return row;
}

}  // namespace danlu
