// The host's half of a step for kernels that are launched from Python: addresses and coefficients as
// plain tables.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../common/lazy_rows.h"
#include "python_values.h"
#include "step_list.h"

namespace danlu {

class AddressList : public StepList {
 public:
  // device: its type and index as DLPack counts
  AddressList(const py::object& exchange_api, const py::module_& torch, const py::object& sharded_type,
              std::pair<int, int> device, bool counters_on_device)
      : StepList(exchange_api, torch, sharded_type, Device{device.first, device.second},
                 counters_on_device ? Counters::on_device : Counters::on_host) {}

  void add(const py::object& spec) {
    const int num_states = int(py::len(spec.attr("formats"))) - 2;
    if (num_states > max_states) throw py::value_error("more states than a native list holds");
    StepList::add(spec, num_states);
    num_states_.push_back(num_states);
    const py::object lazy = spec.attr("sparse_mode");
    if (lazy.is_none()) return lazy_shapes_.push_back({});
    needs_list();
    const auto shape = spec.attr("shape").cast<std::vector<int64_t>>();
    lazy_shapes_.push_back({shape[0], elements_of_row(shape), lazy.cast<std::string>() == "params"});
  }

  // Names some tensors with equally many states; the number that table() knows them by.
  int select(std::vector<int> indices) {
    selections_.push_back(std::move(indices));
    return int(selections_.size()) - 1;
  }

  // What refresh() read of a selection, whose tensors have the same formats: a row of addresses for each of
  // parameter, gradient and states, then the indices of coefficients, -1 where there is no gradient; then a
  // row for each further array of these, and the places of first elements. As bytes of int64.
  py::bytes table(int selection) const {
    const std::vector<int>& indices = selections_.at(selection);
    return table_of(indices.size(), num_states_of(selection),
                    [&](size_t i) -> const Tensor& { return tensors()[indices[i]]; });
  }

  // Of a selection of lazy parameters, whose tensors are runs of their rows: table(), then for each tensor
  // how many elements it has (int64), then for each chunk of chunk_size elements its tensor and which of its
  // chunks it is (int32). idle: how far behind the coefficients of listed rows that of the others is;
  // zeros: the address of num_zeros fp32 zeros on the device.
  std::tuple<py::bytes, py::bytes, py::bytes, py::bytes> lazy_table(int selection, int64_t chunk_size,
                                                                    int idle, uintptr_t zeros) const {
    const int num_states = num_states_of(selection);
    std::vector<Tensor> runs;
    std::vector<int64_t> sizes;
    std::vector<int32_t> chunk_tensors, chunk_indices;
    const auto add = [&](const Tensor& run, size_t) {
      for (int64_t i = 0; i * chunk_size < run.size; i++) {
        chunk_tensors.push_back(int32_t(runs.size()));
        chunk_indices.push_back(int32_t(i));
      }
      runs.push_back(run);
      sizes.push_back(run.size);
    };
    const std::vector<int>& indices = selections_.at(selection);
    launched().for_each(indices.begin(), indices.end(), num_states, idle, zeros, add);
    const auto run_at = [&](size_t i) -> const Tensor& { return runs[i]; };
    return {table_of(runs.size(), num_states, run_at), as_bytes(sizes), as_bytes(chunk_tensors),
            as_bytes(chunk_indices)};
  }

  // The addresses of a selection's gradients, 0 where there is none, then at a multiple of 16 bytes how many
  // elements are there; as bytes of int64.
  py::bytes gradients(int selection) const {
    std::vector<int64_t> values, sizes;
    for (const int i : selections_.at(selection)) {
      const Tensor& t = tensors()[i];
      values.push_back(t.coefficients < 0 ? 0 : int64_t(reinterpret_cast<uintptr_t>(t.g.data[0])));
      sizes.push_back(launched().gradient_size(i));
    }
    if (values.size() % 2) values.push_back(0);
    values.insert(values.end(), sizes.begin(), sizes.end());
    return as_bytes(values);
  }

 protected:
  LaunchedTensors launched() const { return {tensors(), listed(), lazy_shapes_}; }

 private:
  int num_states_of(int selection) const {
    const std::vector<int>& indices = selections_.at(selection);
    return indices.empty() ? 0 : num_states_[indices[0]];
  }

  template <class TensorAt>
  static py::bytes table_of(size_t n, int num_states, const TensorAt& tensor_at) {
    const int coefficients = 2 + num_states, further = coefficients + 1;
    const int first = further + (n > 0 ? num_further(tensor_at(0), num_states) : 0);
    std::vector<int64_t> values((first + 1) * n);
    for (size_t i = 0; i < n; i++) {
      const Tensor& t = tensor_at(i);
      for_arrays(t, num_states, further, [&](int row, const void* address) {
        values[row * n + i] = int64_t(reinterpret_cast<uintptr_t>(address));
      });
      values[coefficients * n + i] = t.coefficients;
      values[first * n + i] = t.first;
    }
    return as_bytes(values);
  }

  std::vector<int> num_states_;
  std::vector<LazyShape> lazy_shapes_;
  std::vector<std::vector<int>> selections_;
};

}  // namespace danlu
