// Coefficients on their way from Python to the kernels.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "ieee.h"

namespace danlu {

namespace py = pybind11;

// "a, b" as COEFFS writes it: ("a", "b")
inline py::tuple split_names(const char* names) {
  std::vector<std::string> split(1);
  for (const char* c = names; *c; c++) {
    if (*c == ',')
      split.emplace_back();
    else if (*c != ' ')
      split.back() += *c;
  }
  return py::tuple(py::cast(split));
}

// One row of fp32 numbers for each (group, step) of a step that is being made.
class CoefficientRows {
 public:
  // rows: sequences of float64 numbers, each rounded once to fp32; stride: floats from one row to the next,
  // at least as many as the longest has
  void assign(const py::list& rows, int stride) {
    const IeeeArithmetic scope;
    stride_ = stride;
    values_.assign(rows.size() * stride, 0.f);
    float* to = values_.data();
    for (const py::handle row : rows) {
      int i = 0;
      for (const py::handle value : row) to[i++] = float(value.cast<double>());
      to += stride;
    }
  }

  const float* operator[](int row) const { return &values_[size_t(row) * stride_]; }
  int stride() const { return stride_; }

  py::bytes bytes() const {
    return {reinterpret_cast<const char*>(values_.data()), values_.size() * sizeof(float)};
  }

 private:
  std::vector<float> values_;
  int stride_ = 0;
};

}  // namespace danlu
