// The host's half of a step, for every native backend: one loop over the parameters that reads gradients and
// addresses and compares them with what the plan recorded, then one that advances the step counters. It
// decides nothing: whatever does not match makes the plan out of date, and Python looks again.
#pragma once
#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "tensor_list.h"
#include "tensor_view.h"

namespace danlu {

class StepList {
 public:
  StepList(const py::object& exchange_api, const py::module_& torch, const py::object& sharded_type)
      : viewer_(exchange_api, torch), plain_type_(torch.attr("Tensor")), sharded_type_(sharded_type) {}

  // `entry` is a danlu.plan.Entry and stays alive, with all that it refers to, as long as this list: its
  // owner in Python holds it, so that the garbage collector sees the references.
  void add(const py::object& entry, const RuleInfo& rule) {
    Record r;
    r.param = entry.attr("param").ptr();
    r.state = entry.attr("state").ptr();
    r.group = entry.attr("group").cast<int>();
    r.cycle = entry.attr("cycle").cast<int>();
    r.sharded = entry.attr("sharded").cast<bool>();
    r.num_states = rule.num_states;
    for (const py::handle dim : entry.attr("shape")) {
      r.layout.shape.push_back(dim.cast<int64_t>());
      r.layout.size *= r.layout.shape.back();
    }
    for (const py::handle stride : entry.attr("strides")) r.layout.strides.push_back(stride.cast<int64_t>());

    const auto dtypes = entry.attr("dtypes").cast<std::vector<std::string>>();  // parameter, gradient, states
    Tensor t = {};
    t.size = r.layout.size;
    t.kernel = rule.kernel;
    t.row = -1;
    t.p.dtype = dtype_of(dtypes.at(0));
    t.g.dtype = dtype_of(dtypes.at(1));
    const py::dict state = entry.attr("state");
    for (const py::handle name : entry.attr("state_names")) {
      const size_t i = r.names.size();
      if (int(i) < rule.num_states) t.states[i].dtype = dtype_of(dtypes.at(2 + i));
      r.names.push_back(name.ptr());
      r.tensors.push_back(py::object(state[name]).ptr());
    }
    r.step = r.tensors.at(rule.num_states);
    r.micro_step = r.cycle > 1 ? r.tensors.at(rule.num_states + 1) : nullptr;
    records_.push_back(std::move(r));
    tensors_.push_back(t);
  }

  // Records the order in which opt.state holds the parameters, so that a walk over it needs no hashing of
  // tensors.
  void bind(const py::dict& state) {
    std::map<PyObject*, int> index;
    for (size_t i = 0; i < records_.size(); i++) index[records_[i].param] = int(i);
    order_.clear();
    for (const auto& [key, value] : state) {
      const auto found = index.find(key.ptr());
      order_.push_back({key.ptr(), found == index.end() ? -1 : found->second});
    }
  }

  // Reads everything, writes nothing. None if anything differs from the records; else the coefficient rows
  // that this step needs, as tuples (group, step that is being made, micro-step).
  py::object gather(const py::dict& state) {
    release();
    row_of_.clear();
    if (!same_states(state)) return py::none();
    py::list keys;
    Key last{-1, 0.f, 0.f};
    int last_row = -1;
    static PyObject* const grad = PyUnicode_InternFromString("grad");
    for (size_t i = 0; i < records_.size(); i++) {
      Record& r = records_[i];
      Tensor& t = tensors_[i];
      t.row = -1;
      PyObject* g = hold(PyObject_GetAttr(r.param, grad));
      if (g == Py_None) continue;
      if (!addresses(r, t, g)) {
        release();
        return py::none();
      }
      const Key key{r.group, *r.step_value + 1.f, r.cycle > 1 ? *r.micro_value : 0.f};
      if (key != last) {
        const auto [found, fresh] = row_of_.try_emplace(key, int(row_of_.size()));
        if (fresh) keys.append(py::make_tuple(std::get<0>(key), std::get<1>(key), std::get<2>(key)));
        last = key;
        last_row = found->second;
      }
      t.row = last_row;
    }
    return std::move(keys);
  }

  // How many parameters have a gradient in this step.
  int active() const {
    int count = 0;
    for (const Tensor& t : tensors_) count += t.row >= 0;
    return count;
  }

  std::vector<bool> mask() const {
    std::vector<bool> out;
    for (const Tensor& t : tensors_) out.push_back(t.row >= 0);
    return out;
  }

  void advance() {
    for (size_t i = 0; i < records_.size(); i++) {
      if (tensors_[i].row < 0) continue;
      const Record& r = records_[i];
      if (r.cycle > 1) {
        *r.micro_value = *r.micro_value + 1.f < float(r.cycle) ? *r.micro_value + 1.f : 0.f;
        if (*r.micro_value != 0.f) continue;
      }
      *r.step_value += 1.f;
    }
  }

  // Lets go of the gradients.
  void release() {
    for (PyObject* object : held_) Py_XDECREF(object);
    held_.clear();
  }

  ~StepList() { release(); }
  StepList(const StepList&) = delete;
  StepList& operator=(const StepList&) = delete;

  const std::vector<Tensor>& tensors() const { return tensors_; }

 private:
  using Key = std::tuple<int, float, float>;

  struct Record {
    PyObject *param, *state;
    std::vector<PyObject*> names,
        tensors;  // of the state: moments, then step, then micro_step where there is a cycle
    PyObject *step, *micro_step;
    float *step_value = nullptr, *micro_value = nullptr;
    Layout layout;
    int group, cycle, num_states;  // cycle: gradients for one update
    bool sharded;                  // a DTensor: the local tensors are what is updated
  };

  struct Place {
    PyObject* key;
    int record;
  };

  static Dtype dtype_of(const std::string& name) {
    if (name == "float32") return Dtype::f32;
    if (name == "bfloat16") return Dtype::bf16;
    if (name == "float16") return Dtype::f16;
    throw std::invalid_argument("no storage format " + name);
  }

  // Takes ownership until release().
  PyObject* hold(PyObject* object) {
    if (!object) throw py::error_already_set();
    held_.push_back(object);
    return object;
  }

  bool same_states(const py::dict& state) const {
    Py_ssize_t at = 0;
    size_t i = 0;
    PyObject *key, *value;
    while (PyDict_Next(state.ptr(), &at, &key, &value)) {
      if (i >= order_.size() || key != order_[i].key) return false;
      const int record = order_[i++].record;
      if (record < 0) continue;
      const Record& r = records_[record];
      if (value != r.state) return false;
      for (size_t j = 0; j < r.names.size(); j++)
        if (PyDict_GetItem(value, r.names[j]) != r.tensors[j]) return false;
    }
    return i == order_.size();
  }

  bool addresses(Record& r, Tensor& t, PyObject* g) {
    if (Py_TYPE(g) != reinterpret_cast<PyTypeObject*>((r.sharded ? sharded_type_ : plain_type_).ptr()))
      return false;
    void* address;
    if (!viewer_.address(local(r, g), t.g.dtype, r.layout, &t.g.data)) return false;
    if (!viewer_.address(local(r, r.param), t.p.dtype, r.layout, &t.p.data)) return false;
    for (int j = 0; j < r.num_states; j++)
      if (!viewer_.address(local(r, r.tensors[j]), t.states[j].dtype, r.layout, &t.states[j].data))
        return false;
    if (!viewer_.address(r.step, Dtype::f32, scalar_, &address)) return false;
    r.step_value = static_cast<float*>(address);
    if (r.cycle > 1) {
      if (!viewer_.address(r.micro_step, Dtype::f32, scalar_, &address)) return false;
      r.micro_value = static_cast<float*>(address);
    }
    return true;
  }

  PyObject* local(const Record& r, PyObject* tensor) {
    static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
    return r.sharded ? hold(PyObject_GetAttr(tensor, name)) : tensor;
  }

  TensorViewer viewer_;
  py::object plain_type_, sharded_type_;
  const Layout scalar_;
  std::vector<Record> records_;
  std::vector<Tensor> tensors_;
  std::vector<Place> order_;
  std::vector<PyObject*> held_;
  std::map<Key, int> row_of_;
};

}  // namespace danlu
