// The host's half of a step, for every native backend: one loop over the parameters that reads gradients and
// addresses and compares them with what the plan recorded, then one that advances the step counters. It
// decides nothing: whatever does not match makes the plan out of date, and Python looks again.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "../common/format_names.h"
#include "../common/listed_rows.h"
#include "../common/tensor_list.h"
#include "cache_lines.h"
#include "tensor_view.h"
#include "value_arrays.h"

namespace danlu {

// Where `step` and `micro_step` are, and so who reads and advances them: this list, or operations on the
// device.
enum class Counters { on_host, on_device };

class StepList {
 public:
  using Listing = std::tuple<int, uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, uintptr_t>;

  StepList(const py::object& exchange_api, const py::module_& torch, const py::object& sharded_type,
           Device device, Counters counters)
      : viewer_(exchange_api, torch, device),
        counter_viewer_(exchange_api, torch, counters == Counters::on_host ? Device{dlpack::cpu, 0} : device),
        counters_(counters),
        plain_type_(torch.attr("Tensor")),
        sharded_type_(sharded_type) {}

  // `spec` is a danlu.spec.ParamSpec and stays alive, with all that it refers to, as long as this list: its
  // owner in Python holds it, so that the garbage collector sees the references.
  void add(const py::object& spec, int num_states) {
    Record r;
    r.param = spec.attr("param").ptr();
    r.state = spec.attr("state").ptr();
    r.coefficients_index = spec.attr("coefficients_index").cast<int>();
    r.accumulation_steps = spec.attr("accumulation_steps").cast<int>();
    r.sharded = spec.attr("sharded").cast<bool>();
    r.takes_gradient = spec.attr("takes_gradient").cast<bool>();
    const auto shape = spec.attr("shape").cast<std::vector<int64_t>>();
    r.ndim = int(shape.size());
    r.first_dim = dims_.size();
    dims_.insert(dims_.end(), shape.begin(), shape.end());
    for (const py::handle stride : spec.attr("strides")) dims_.push_back(stride.cast<int64_t>());

    const auto formats =
        spec.attr("formats").cast<std::vector<std::string>>();  // parameter, gradient, states
    Tensor t = {};
    t.size = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
    t.first = 0;
    t.coefficients = -1;
    for (int i = 0; i < 2 + num_states; i++) value_of(t, i).format = find_format(formats.at(i));
    const py::dict state = spec.attr("state");
    r.first_tensor = state_tensors_.size();
    r.first_line = lines_.size();
    lines_.add(spec.attr("param"), r.sharded);
    const std::vector<std::pair<int, int>> arrays = arrays_in_state(t, num_states);
    r.num_arrays = int(arrays.size());
    for (const py::handle name : spec.attr("state_names")) {
      const py::object tensor = state[name];
      const int i = r.num_tensors++;
      StateTensor stored{name.ptr(), tensor.ptr(), r.ndim, r.first_dim, 0, 0};
      if (i < r.num_arrays) {
        std::tie(stored.value, stored.array) = arrays[i];
        const py::object own = r.sharded ? tensor.attr("_local_tensor") : tensor;
        const auto its_shape = own.attr("shape").cast<std::vector<int64_t>>();
        if (its_shape != shape) {
          stored.ndim = int(its_shape.size());
          stored.first_dim = dims_.size();
          dims_.insert(dims_.end(), its_shape.begin(), its_shape.end());
          for (const py::handle stride : own.attr("stride")()) dims_.push_back(stride.cast<int64_t>());
        }
      }
      state_tensors_.push_back(stored);
      lines_.add(tensor, r.sharded && i < r.num_arrays);
    }
    r.num_lines = int(lines_.size() - r.first_line);
    records_.push_back(r);
    tensors_.push_back(t);
  }

  // Prepares for comparisons with opt.state.
  void bind(const py::dict& state) {
    if (!looks_up(state)) note_order(state);
  }

  // Reads everything, writes nothing. None if anything differs from the records; else the coefficients
  // that this step needs, as tuples (index of coefficients, step that is being made, micro-step). With
  // counters on the device there are none: then their index is the tensor's. listed: of gradients of which
  // some rows take part, in the order of the tensors, the members of ListedRows as numbers; their owner in
  // Python has compared them with the plan. copy_gradient: called with a tensor's index where its gradient
  // does not look as recorded; gives a tensor of those dtype and strides to read in its place, or None if
  // there is none.
  py::object refresh(const py::dict& state, const std::vector<Listing>& listed,
                     const py::object& copy_gradient) {
    release();
    const auto numbers = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
    for (const auto& [tensor, values, num_values, rows, count, permutation, offsets] : listed)
      listed_.push_back({tensor, reinterpret_cast<void*>(values), num_values, numbers(rows), count,
                         numbers(permutation), numbers(offsets)});
    indices_.clear();
    if (!same_states(state)) return py::none();
    py::list keys;
    Key last{-1, 0.f, 0.f};
    int coefficients = -1;
    static PyObject* const grad = PyUnicode_InternFromString("grad");
    auto list = listed_.begin();
    for (size_t i = 0; i < records_.size(); i++) {
      if (i + lookahead < records_.size()) ask_for(records_[i + lookahead]);
      Record& r = records_[i];
      Tensor& t = tensors_[i];
      t.coefficients = -1;
      const bool lists = list != listed_.end() && list->tensor == int(i);
      PyObject* g = r.takes_gradient && !lists ? hold(PyObject_GetAttr(r.param, grad)) : nullptr;
      if (g == Py_None) continue;
      if (r.needs_list && !lists) {  // another thread may have given it just now
        release();
        return py::none();
      }
      // states first: what follows calls torch, which may let another thread replace one
      if (!hold_states(r) || !(reads(r, t, g) || copies(r, t, i, copy_gradient)) || !addresses(r, t, g)) {
        release();
        return py::none();
      }
      if (lists) t.g.data[0] = (list++)->values;
      if (counters_ == Counters::on_device) {
        t.coefficients = int(i);
        continue;
      }
      const Key key{r.coefficients_index, number(r.step) + 1.f,
                    r.accumulation_steps > 1 ? number(r.micro_step) : 0.f};
      if (key != last) {
        const auto [found, fresh] = indices_.try_emplace(key, int(indices_.size()));
        if (fresh) keys.append(py::make_tuple(std::get<0>(key), std::get<1>(key), std::get<2>(key)));
        last = key;
        coefficients = found->second;
      }
      t.coefficients = coefficients;
    }
    if (moved_) {
      moved_ = false;
      if (share_memory()) {
        release();
        return py::none();
      }
    }
    return std::move(keys);
  }

  // How many parameters have a gradient in this step.
  int active() const {
    int count = 0;
    for (const Tensor& t : tensors_) count += t.coefficients >= 0;
    return count;
  }

  std::vector<bool> mask() const {
    std::vector<bool> out;
    for (const Tensor& t : tensors_) out.push_back(t.coefficients >= 0);
    return out;
  }

  // Counts this step where the counters are on the host.
  void advance() {
    if (counters_ == Counters::on_device) return;
    for (size_t i = 0; i < records_.size(); i++) {
      if (tensors_[i].coefficients < 0) continue;
      const Record& r = records_[i];
      if (r.accumulation_steps > 1) {
        float& micro_step = number(r.micro_step);
        micro_step = micro_step + 1.f < float(r.accumulation_steps) ? micro_step + 1.f : 0.f;
        if (micro_step != 0.f) continue;
      }
      number(r.step) += 1.f;
    }
  }

  // Lets go of gradients and states.
  void release() {
    for (PyObject* object : held_) Py_XDECREF(object);
    held_.clear();
    listed_.clear();
  }

  ~StepList() { release(); }
  StepList(const StepList&) = delete;
  StepList& operator=(const StepList&) = delete;

  // The last tensor added can be stepped only as a list of rows.
  void needs_list() { records_.back().needs_list = true; }

  const std::vector<Tensor>& tensors() const { return tensors_; }
  const std::vector<ListedRows>& listed() const { return listed_; }

 private:
  using Key = std::tuple<int, float, float>;

  // The kernels push torch's own records out of the caches at every step; asking for those of a parameter
  // some turns ahead takes a third off the refresh of thousands.
  static constexpr size_t lookahead = 6;
  // Entries of opt.state that a walk passes in the time of one lookup.
  static constexpr size_t walked_per_record = 16;

  struct StateTensor {
    PyObject *name, *tensor;
    int ndim;
    size_t first_dim;  // the parameter's, but where a state has a shape of its own
    int value, array;  // as value_of() counts, and which of its arrays
  };

  // Small and without pointers to memory of its own: with thousands of parameters the time of a refresh is
  // that of its cache misses.
  struct Record {
    PyObject *param, *state;
    void *step = nullptr, *micro_step = nullptr;  // addresses of their numbers
    size_t first_tensor, first_dim, first_line;   // of its states, its shape and strides, its cache lines
    int num_tensors = 0;  // arrays of values, then step, then micro_step where there is a cycle
    int num_arrays, num_lines, ndim, coefficients_index;
    int accumulation_steps;  // gradients for one update
    bool sharded;            // a DTensor: the local tensors are what is updated
    bool takes_gradient;     // else every step takes the parameter, and reads no gradient
    bool needs_list = false;
  };

  struct Place {
    PyObject* key;
    int record;
  };

  static float& number(void* data) { return *static_cast<float*>(data); }

  void ask_for(const Record& r) const { lines_.ask_for(r.first_line, r.num_lines); }

  // Takes ownership until release().
  PyObject* hold(PyObject* object) {
    if (!object) throw py::error_already_set();
    held_.push_back(object);
    return object;
  }

  // Whether all of its parameters are there.
  bool note_order(const py::dict& state) {
    std::map<PyObject*, int> index;
    for (size_t i = 0; i < records_.size(); i++) index[records_[i].param] = int(i);
    order_.clear();
    size_t present = 0;
    for (const auto& [key, value] : state) {
      const auto found = index.find(key.ptr());
      order_.push_back({key.ptr(), found == index.end() ? -1 : found->second});
      present += found != index.end();
    }
    return present == records_.size();
  }

  // Whether each parameter has the dict of states that was recorded.
  bool same_states(const py::dict& state) {
    if (looks_up(state)) return found_same(state);
    // the first step of other groups adds their states
    return walked_same(state) || (note_order(state) && walked_same(state));
  }

  // A walk hashes no tensor, which is a call of Python, but visits the states of parameters that are not in
  // this list: of a list that has few of them it would be the whole time of a step.
  bool looks_up(const py::dict& state) const { return state.size() > walked_per_record * records_.size(); }

  bool found_same(const py::dict& state) const {
    for (const Record& r : records_) {
      PyObject* const held = PyDict_GetItemWithError(state.ptr(), r.param);
      if (!held && PyErr_Occurred()) throw py::error_already_set();
      if (held != r.state) return false;
    }
    return true;
  }

  bool walked_same(const py::dict& state) const {
    Py_ssize_t at = 0;
    size_t i = 0;
    PyObject *key, *value;
    while (PyDict_Next(state.ptr(), &at, &key, &value)) {
      if (i >= order_.size() || key != order_[i].key) return false;
      const int record = order_[i++].record;
      if (record < 0) continue;
      const Record& r = records_[record];
      if (value != r.state) return false;
    }
    return i == order_.size();
  }

  // Whether the parameter's own dict holds the tensors that were recorded; they live until release(), since
  // another thread may replace them while kernels run.
  bool hold_states(const Record& r) {
    for (size_t j = r.first_tensor; j < r.first_tensor + r.num_tensors; j++) {
      PyObject* const tensor = PyDict_GetItem(r.state, state_tensors_[j].name);
      if (tensor != state_tensors_[j].tensor) return false;
      Py_INCREF(tensor);
      hold(tensor);
    }
    return true;
  }

  // Whether the gradient can be read where it is; g: null if none is read.
  bool reads(const Record& r, Tensor& t, PyObject* g) {
    t.g.data[0] = nullptr;  // another tensor may lie where the last one did
    if (!g) return true;
    const py::object& type = r.sharded ? sharded_type_ : plain_type_;
    return Py_TYPE(g) == reinterpret_cast<PyTypeObject*>(type.ptr()) &&
           viewer_.address(local(r, g), info_of(t.g.format).arrays[0], layout_of(r.ndim, r.first_dim, t.size),
                           &t.g.data[0]);
  }

  // Whether a copy of the gradient can; it lives until release().
  bool copies(const Record& r, Tensor& t, size_t index, const py::object& copy_gradient) {
    if (copy_gradient.is_none()) return false;
    PyObject* copy = hold(copy_gradient(index).release().ptr());
    t.g.data[0] = nullptr;
    return copy != Py_None && viewer_.address(copy, info_of(t.g.format).arrays[0],
                                              layout_of(r.ndim, r.first_dim, t.size), &t.g.data[0]);
  }

  // Of everything but the gradient, whose states are held.
  bool addresses(Record& r, Tensor& t, PyObject* g) {
    const Layout layout = layout_of(r.ndim, r.first_dim, t.size);
    const StateTensor* tensors = &state_tensors_[r.first_tensor];
    const void* const before = t.p.data[0];
    if (!viewer_.address(local(r, r.param), info_of(t.p.format).arrays[0], layout, &t.p.data[0]))
      return false;
    moved_ |= before && before != t.p.data[0];
    if (!g) t.g.data[0] = t.p.data[0];  // Triton's interpreter reads also what the rule has no use for
    for (int j = 0; j < r.num_arrays; j++) {
      const StateTensor& held = tensors[j];
      Storage& value = value_of(t, held.value);
      if (!viewer_.address(local(r, held.tensor), info_of(value.format).arrays[held.array],
                           layout_of(held.ndim, held.first_dim, t.size), &value.data[held.array]))
        return false;
    }
    const ArrayInfo& counter = ElementInfo<float>::value;
    if (!counter_viewer_.address(tensors[r.num_arrays].tensor, counter, Layout(), &r.step)) return false;
    return r.accumulation_steps == 1 ||
           counter_viewer_.address(tensors[r.num_arrays + 1].tensor, counter, Layout(), &r.micro_step);
  }

  // Whether parameters have been put over one memory since the plan was made, which then gave them turns.
  bool share_memory() const {
    std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
    for (const Tensor& t : tensors_)
      if (t.p.data[0] && t.size > 0) {
        const auto begin = reinterpret_cast<uintptr_t>(t.p.data[0]);
        ranges.emplace_back(begin, begin + t.size * info_of(t.p.format).arrays[0].bytes);
      }
    std::sort(ranges.begin(), ranges.end());
    for (size_t i = 1; i < ranges.size(); i++)
      if (ranges[i].first < ranges[i - 1].second) return true;
    return false;
  }

  Layout layout_of(int ndim, size_t first_dim, int64_t size) const {
    const int64_t* dims = dims_.data() + first_dim;
    return {ndim, size, dims, dims + ndim};
  }

  PyObject* local(const Record& r, PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
    return r.sharded ? hold(PyObject_GetAttr(tensor, name)) : tensor;
  }

  TensorViewer viewer_, counter_viewer_;
  Counters counters_;
  py::object plain_type_, sharded_type_;
  std::vector<Record> records_;
  std::vector<StateTensor> state_tensors_;
  std::vector<int64_t> dims_;
  CacheLines lines_;
  std::vector<Tensor> tensors_;
  std::vector<Place> order_;
  bool moved_ = false;  // a parameter has another address than in the step before
  std::vector<PyObject*> held_;
  std::vector<ListedRows> listed_;
  std::map<Key, int> indices_;
};

// The Python class of a list, with what all of them have; the way in and run() are each one's own.
template <class List>
py::class_<List> step_list_class(py::module_& m, const char* name) {
  return py::class_<List>(m, name, py::module_local())
      .def("add", &List::add)
      .def("bind", &List::bind)
      .def("refresh", &List::refresh, py::arg("state"), py::arg("listed") = std::vector<StepList::Listing>(),
           py::arg("copy_gradient") = py::none())
      .def("active", &List::active)
      .def("mask", &List::mask)
      .def("release", &List::release);
}

}  // namespace danlu
