// What an engine sees of the tensors of a step.
#pragma once
#include <cstdint>

#include "types.h"

namespace danlu {

constexpr int max_states = 4;

struct Storage {
  void* data;
  Dtype dtype;
};

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// The address of the element that lies so many behind the first, or before it.
inline void* moved(Storage x, int64_t by) {
  return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(x.data) + uintptr_t(by * bytes_of(x.dtype)));
}

struct Tensor {
  Storage p, g, states[max_states];
  int64_t size;
  int32_t coefficients;  // their index; negative: no gradient, leave it alone
};

// The engine's own words in front of every coefficients.
struct CoefficientsHeader {
  float factor;        // multiplies the gradient
  float store_params;  // 0: states move, the parameter does not
};

struct RuleInfo {
  const char* name;
  const char* coeff_names;  // as COEFFS lists them
  int num_states, num_coeffs;

  // floats of a coefficients
  constexpr int num_floats() const { return int(sizeof(CoefficientsHeader) / sizeof(float)) + num_coeffs; }
};

template <class Rule>
constexpr RuleInfo rule_info(const char* name) {
  return {name, Rule::coeff_names, Rule::num_states, int(sizeof(typename Rule::Coeffs) / sizeof(float))};
}

}  // namespace danlu
