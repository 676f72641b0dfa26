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
  // rows: sequences of float64 numbers, each rounded once to fp32
  void assign(const py::list& rows) {
    const IeeeArithmetic scope;
    values_.clear();
    starts_.clear();
    for (const py::handle row : rows) {
      starts_.push_back(values_.size());
      for (const py::handle value : row) values_.push_back(float(value.cast<double>()));
    }
  }

  const float* operator[](int row) const { return &values_[starts_[row]]; }

 private:
  std::vector<float> values_;
  std::vector<size_t> starts_;
};

}  // namespace danlu
