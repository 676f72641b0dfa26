// The host's half of a step for kernels that are launched from Python: addresses and coefficient rows as
// plain tables.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "coefficient_rows.h"
#include "ieee.h"
#include "step_list.h"

namespace danlu {

class AddressList {
 public:
  // device_type: as DLPack counts
  AddressList(const py::object& exchange_api, const py::module_& torch, const py::object& sharded_type,
              std::pair<int, int> device, bool counters_on_device)
      : list_(exchange_api, torch, sharded_type, Device{device.first, device.second},
              counters_on_device ? Counters::on_device : Counters::on_host) {}

  void add(const py::object& entry) {
    const int num_states = int(py::len(entry.attr("dtypes"))) - 2;
    if (num_states > max_states) throw py::value_error("more states than a native list holds");
    list_.add(entry, num_states);
    num_states_.push_back(num_states);
  }

  void bind(const py::dict& state) { list_.bind(state); }
  py::object gather(const py::dict& state) { return list_.gather(state); }
  int active() const { return list_.active(); }
  std::vector<bool> mask() const { return list_.mask(); }
  void release() { list_.release(); }
  void advance() { list_.advance(); }

  // What gather() read of some tensors with equally many states: a row of addresses for each of parameter,
  // gradient and states, then the indices of coefficient rows, -1 where there is no gradient; as bytes of
  // int64.
  py::bytes table(const std::vector<int>& indices) const {
    const size_t n = indices.size();
    const int num_states = n ? num_states_[indices[0]] : 0;
    std::vector<int64_t> values((2 + num_states + 1) * n);
    for (size_t i = 0; i < n; i++) {
      const Tensor& t = list_.tensors()[indices[i]];
      const auto put = [&](int row, const void* address) {
        values[row * n + i] = int64_t(reinterpret_cast<uintptr_t>(address));
      };
      put(0, t.p.data);
      put(1, t.g.data);
      for (int j = 0; j < num_states; j++) put(2 + j, t.states[j].data);
      values[(2 + num_states) * n + i] = t.row;
    }
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t)};
  }

 private:
  StepList list_;
  std::vector<int> num_states_;
};

// Rows of float64 numbers, each rounded once to fp32, padded to a common length; as bytes of fp32.
inline py::bytes rounded_rows(const py::list& rows, int length) {
  const IeeeArithmetic scope;
  std::vector<float> values(py::len(rows) * length);
  size_t at = 0;
  for (const py::handle row : rows) {
    size_t i = at;
    for (const py::handle value : row) values[i++] = float(value.cast<double>());
    at += length;
  }
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

}  // namespace danlu
