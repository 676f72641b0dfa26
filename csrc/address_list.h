// The host's half of a step for kernels that are launched from Python: addresses and coefficient rows as
// plain tables.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "coefficient_rows.h"
#include "lazy_rows.h"
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
    const py::object lazy = entry.attr("lazy");
    const auto shape = entry.attr("shape").cast<std::vector<int64_t>>();
    if (lazy.is_none()) return lazy_shapes_.push_back({});
    const auto times = std::multiplies<int64_t>();
    const int64_t columns = std::accumulate(shape.begin() + 1, shape.end(), int64_t{1}, times);
    lazy_shapes_.push_back({shape[0], columns, lazy.cast<std::string>() == "params"});
  }

  // Names some tensors with equally many states; the number that table() knows them by.
  int select(std::vector<int> indices) {
    selections_.push_back(std::move(indices));
    return int(selections_.size()) - 1;
  }

  // What gather() read of a selection: a row of addresses for each of parameter, gradient and states, then
  // the indices of coefficient rows, -1 where there is no gradient; as bytes of int64.
  py::bytes table(int selection) const {
    std::vector<Tensor> selected;
    for (const int i : selections_.at(selection)) selected.push_back(tensors()[i]);
    return table_of(selected, num_states_of(selection));
  }

  // Of a selection of lazy parameters, whose tensors are runs of their rows: table(), then for each tensor
  // how many elements it has (int64), then for each chunk of chunk_size elements its tensor and which of its
  // chunks it is (int32). resting: how far behind the coefficient row of listed rows that of the others is;
  // zeros: the address of num_zeros fp32 zeros on the device.
  std::tuple<py::bytes, py::bytes, py::bytes, py::bytes> lazy_table(int selection, int64_t chunk_size,
                                                                    int resting, uintptr_t zeros) const {
    const int num_states = num_states_of(selection);
    std::vector<Tensor> runs;
    std::vector<int64_t> sizes;
    std::vector<int32_t> chunk_tensors, chunk_indices;
    const auto add = [&](const Tensor& run) {
      for (int64_t i = 0; i * chunk_size < run.size; i++) {
        chunk_tensors.push_back(int32_t(runs.size()));
        chunk_indices.push_back(int32_t(i));
      }
      runs.push_back(run);
      sizes.push_back(run.size);
    };
    for (const int i : selections_.at(selection)) {
      Tensor t = tensors()[i];
      if (t.row < 0) continue;
      for_listed_rows(lazy_shape(i), t, num_states, *list_of(i), add);
      t.row += resting;
      if (lazy_shape(i).all_moments)
        for_other_rows(lazy_shape(i), t, num_states, *list_of(i), reinterpret_cast<void*>(zeros), add);
    }
    return {table_of(runs, num_states), as_bytes(sizes), as_bytes(chunk_tensors), as_bytes(chunk_indices)};
  }

  // The addresses of a selection's gradients, 0 where there is none, then how many elements are there; as
  // bytes of int64.
  py::bytes gradients(int selection) const {
    std::vector<int64_t> values, sizes;
    for (const int i : selections_.at(selection)) {
      const Tensor& t = tensors()[i];
      values.push_back(t.row < 0 ? 0 : int64_t(reinterpret_cast<uintptr_t>(t.g.data)));
      sizes.push_back(gradient_size(i));
    }
    values.insert(values.end(), sizes.begin(), sizes.end());
    return as_bytes(values);
  }

 protected:
  const LazyShape& lazy_shape(size_t tensor) const { return lazy_shapes_[tensor]; }

  // The rows of a tensor that this step lists; null where it steps all.
  const ListedRows* list_of(size_t tensor) const {
    const auto before = [](const ListedRows& list, int tensor) { return list.tensor < tensor; };
    const auto found = std::lower_bound(listed().begin(), listed().end(), int(tensor), before);
    return found != listed().end() && found->tensor == int(tensor) ? &*found : nullptr;
  }

  // Elements behind the address of a gradient.
  int64_t gradient_size(size_t tensor) const {
    const ListedRows* list = list_of(tensor);
    return list ? list->num_values * lazy_shape(tensor).columns : tensors()[tensor].size;
  }

 private:
  int num_states_of(int selection) const {
    const std::vector<int>& indices = selections_.at(selection);
    return indices.empty() ? 0 : num_states_[indices[0]];
  }

  static py::bytes table_of(const std::vector<Tensor>& tensors, int num_states) {
    const size_t n = tensors.size();
    std::vector<int64_t> values((2 + num_states + 1) * n);
    for (size_t i = 0; i < n; i++) {
      const Tensor& t = tensors[i];
      const auto put = [&](int row, const void* address) {
        values[row * n + i] = int64_t(reinterpret_cast<uintptr_t>(address));
      };
      put(0, t.p.data);
      put(1, t.g.data);
      for (int j = 0; j < num_states; j++) put(2 + j, t.states[j].data);
      values[(2 + num_states) * n + i] = t.row;
    }
    return as_bytes(values);
  }

  template <class T>
  static py::bytes as_bytes(const std::vector<T>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
  }

  std::vector<int> num_states_;
  std::vector<LazyShape> lazy_shapes_;
  std::vector<std::vector<int>> selections_;
};

// Rows of float64 numbers, each rounded once to fp32, padded to a common length; as bytes of fp32.
inline py::bytes rounded_rows(const py::list& rows, int length) {
  CoefficientRows rounded;
  rounded.assign(rows, length);
  return rounded.bytes();
}

}  // namespace danlu
