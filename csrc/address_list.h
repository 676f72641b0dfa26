// The host's half of a step for kernels that are launched from Python: addresses and coefficient rows as
// plain tables.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "coefficient_rows.h"
#include "step_list.h"

namespace danlu {

class AddressList : public StepList {
 public:
  // device: its type and index as DLPack counts
  AddressList(const py::object& exchange_api, const py::module_& torch, const py::object& sharded_type,
              std::pair<int, int> device, bool counters_on_device)
      : StepList(exchange_api, torch, sharded_type, Device{device.first, device.second},
                 counters_on_device ? Counters::on_device : Counters::on_host) {}

  void add(const py::object& entry) {
    const int num_states = int(py::len(entry.attr("dtypes"))) - 2;
    if (num_states > max_states) throw py::value_error("more states than a native list holds");
    StepList::add(entry, num_states);
    num_states_.push_back(num_states);
  }

  // Names some tensors with equally many states; the number that table() knows them by.
  int select(std::vector<int> indices) {
    selections_.push_back(std::move(indices));
    return int(selections_.size()) - 1;
  }

  // What gather() read of a selection: a row of addresses for each of parameter, gradient and states, then
  // the indices of coefficient rows, -1 where there is no gradient; as bytes of int64.
  py::bytes table(int selection) const {
    const std::vector<int>& indices = selections_.at(selection);
    const size_t n = indices.size();
    const int num_states = n ? num_states_[indices[0]] : 0;
    std::vector<int64_t> values((2 + num_states + 1) * n);
    for (size_t i = 0; i < n; i++) {
      const Tensor& t = tensors()[indices[i]];
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

  // The addresses of a selection's gradients, 0 where there is none; as bytes of int64.
  py::bytes gradients(int selection) const {
    std::vector<int64_t> values;
    for (const int i : selections_.at(selection)) {
      const Tensor& t = tensors()[i];
      values.push_back(t.row < 0 ? 0 : int64_t(reinterpret_cast<uintptr_t>(t.g.data)));
    }
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t)};
  }

 private:
  std::vector<int> num_states_;
  std::vector<std::vector<int>> selections_;
};

// Rows of float64 numbers, each rounded once to fp32, padded to a common length; as bytes of fp32.
inline py::bytes rounded_rows(const py::list& rows, int length) {
  CoefficientRows rounded;
  rounded.assign(rows, length);
  return rounded.bytes();
}

}  // namespace danlu
