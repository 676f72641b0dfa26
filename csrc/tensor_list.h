// What one launch sees of its tensors.
#pragma once
#include <cstdint>

#include "types.h"

namespace danlu {

constexpr int max_states = 2;

struct Tensor;

// Updates elements [begin, end) of a tensor with its coefficient row.
using Kernel = void (*)(const Tensor&, int64_t begin, int64_t end, const float* row);

struct Storage {
  void* data;
  Dtype dtype;
};

struct Tensor {
  Storage p, g, states[max_states];
  int64_t size;
  Kernel kernel;
  int32_t row;  // index of its coefficient row; negative: no gradient, leave it alone
};

// The engine's own words in front of every coefficient row.
struct RowHeader {
  float factor;        // multiplies the gradient
  float store_params;  // 0: states move, the parameter does not
};

struct RuleInfo {
  const char* name;
  const char* coeff_names;  // as COEFFS lists them
  int num_states, num_coeffs;
  Kernel kernel;
};

}  // namespace danlu
