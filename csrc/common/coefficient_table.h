// The coefficients of a step: fp32 numbers for each set that a tensor refers to.
#pragma once
#include <cstddef>
#include <vector>

namespace danlu {

class CoefficientTable {
 public:
  // stride: floats from one set to the next, at least as many as the longest has; all are 0 at first
  void reset(size_t sets, int stride) {
    stride_ = stride;
    values_.assign(sets * stride, 0.f);
  }

  float* operator[](size_t i) { return &values_[i * stride_]; }
  const float* operator[](size_t i) const { return &values_[i * stride_]; }
  int stride() const { return stride_; }
  const std::vector<float>& values() const { return values_; }

 private:
  std::vector<float> values_;
  int stride_ = 0;
};

}  // namespace danlu
