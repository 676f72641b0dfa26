// The coefficients of a step: a row of fp32 numbers for each set that a tensor refers to.
#pragma once
#include <cstddef>
#include <vector>

namespace danlu {

class CoefficientRows {
 public:
  // stride: floats from one row to the next, at least as many as the longest has; all are 0 at first
  void reset(size_t rows, int stride) {
    stride_ = stride;
    values_.assign(rows * stride, 0.f);
  }

  float* row(size_t i) { return &values_[i * stride_]; }
  const float* operator[](size_t i) const { return &values_[i * stride_]; }
  int stride() const { return stride_; }
  const std::vector<float>& values() const { return values_; }

 private:
  std::vector<float> values_;
  int stride_ = 0;
};

}  // namespace danlu
