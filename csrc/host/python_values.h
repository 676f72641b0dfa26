// Values between Python and the engines.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../common/coefficient_table.h"
#include "../common/formats.h"
#include "../common/ieee.h"

namespace danlu {

namespace py = pybind11;

template <class T>
py::bytes as_bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

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

// As danlu.formats has them: by name, the dtypes of the arrays, and whether a number's place counts.
inline py::dict format_table() {
  py::dict table;
  for (const FormatInfo& format : FormatTable<AllFormats>::infos) {
    std::vector<std::string> dtypes;
    for (int i = 0; i < format.num_arrays; i++) dtypes.emplace_back(format.arrays[i].dtype);
    table[format.name] = py::make_tuple(py::tuple(py::cast(dtypes)), format.indexed);
  }
  return table;
}

// coefficients: sequences of float64 numbers, each rounded once to fp32.
inline void read_coefficients(const py::list& coefficients, int stride, CoefficientTable& to) {
  const IeeeArithmetic scope;
  to.reset(coefficients.size(), stride);
  size_t at = 0;
  for (const py::handle set : coefficients) {
    float* values = to[at++];
    for (const py::handle value : set) *values++ = float(value.cast<double>());
  }
}

// As read_coefficients(), padded to a length; as bytes of fp32.
inline py::bytes rounded_coefficients(const py::list& coefficients, int length) {
  CoefficientTable rounded;
  read_coefficients(coefficients, length, rounded);
  return as_bytes(rounded.values());
}

}  // namespace danlu
