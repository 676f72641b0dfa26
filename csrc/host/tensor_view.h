// Reads addresses, dtypes and shapes of torch tensors without torch's headers: through DLPack's C exchange
// API where torch has it (2.10 and newer, 50 ns a tensor), else through the tensor's Python attributes (1
// us).
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/formats.h"

namespace danlu {

namespace py = pybind11;

// DLPack 1.x, as its specification lays them out in memory.
namespace dlpack {
constexpr uint32_t major = 1;
constexpr int32_t cpu = 1, cuda = 2;

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void *allocate, *from_object, *to_object;
  int (*view)(void* object, Tensor* out);  // borrows: valid as long as the object
  void* current_stream;
};
}  // namespace dlpack

struct Device {
  int32_t type, index;  // as DLPack counts
};

// What the plan decided that a tensor must look like; the arrays are the caller's.
struct Layout {
  int ndim = 0;
  int64_t size = 1;
  const int64_t *shape = nullptr, *strides = nullptr;

  bool matches(int other_ndim, const int64_t* other_shape, const int64_t* other_strides) const {
    if (other_ndim != ndim) return false;
    for (int i = 0; i < ndim; i++) {
      if (other_shape[i] != shape[i]) return false;
      // a stride means nothing where there is at most one element along it
      if (other_strides[i] != strides[i] && shape[i] > 1 && size > 0) return false;
    }
    return true;
  }
};

class TensorViewer {
 public:
  // exchange_api: torch.Tensor.__dlpack_c_exchange_api__, or None for the way through Python; torch: the
  // module
  TensorViewer(const py::object& exchange_api, const py::module_& torch, Device device) : device_(device) {
    if (!exchange_api.is_none()) {
      api_ = py::reinterpret_borrow<py::capsule>(exchange_api).get_pointer<dlpack::ExchangeApi>();
      if (api_->major != dlpack::major)
        throw std::invalid_argument("this torch speaks another major version of DLPack");
    }
    for (const FormatInfo& format : FormatTable<AllFormats>::infos)
      for (int i = 0; i < format.num_arrays; i++) {
        const char* dtype = format.arrays[i].dtype;
        dtypes_[dtype] = torch.attr(dtype);
      }
  }

  // The address of a tensor of such elements and layout, on the device, in *data; false if it is anything
  // else. Lazily negated tensors are looked for only where *data changes: that costs as much as the rest.
  bool address(PyObject* tensor, const ArrayInfo& array, const Layout& layout, void** data) const {
    const void* before = *data;
    const bool fits =
        api_ ? by_exchange(tensor, array, layout, data) : by_attributes(tensor, array, layout, data);
    return fits && (*data == before || !negated(tensor));
  }

 private:
  static bool negated(PyObject* tensor) {
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, is_neg));
    if (!answer) throw py::error_already_set();
    return answer.ptr() == Py_True;
  }

  bool by_exchange(PyObject* tensor, const ArrayInfo& array, const Layout& layout, void** data) const {
    dlpack::Tensor t;
    if (api_->view(tensor, &t)) {
      PyErr_Clear();
      return false;
    }
    if (t.device_type != device_.type || t.device_id != device_.index || t.lanes != 1 ||
        t.code != uint8_t(array.kind) || t.bits != 8 * array.bytes)
      return false;
    *data = static_cast<char*>(t.data) + t.byte_offset;
    return layout.matches(t.ndim, t.shape, t.strides);
  }

  bool by_attributes(PyObject* tensor, const ArrayInfo& array, const Layout& layout, void** data) const {
    const py::handle t(tensor);
    try {
      if (!on_device(t) || py::object(t.attr("dtype")).ptr() != dtypes_.at(array.dtype).ptr()) return false;
      const auto shape = t.attr("shape").cast<std::vector<int64_t>>();
      const auto strides = t.attr("stride")().cast<std::vector<int64_t>>();
      *data = reinterpret_cast<void*>(t.attr("data_ptr")().cast<uintptr_t>());
      return layout.matches(int(shape.size()), shape.data(), strides.data());
    } catch (const py::error_already_set&) {
      return false;  // a sparse tensor, say
    }
  }

  bool on_device(const py::handle& t) const {
    if (device_.type == dlpack::cpu) return t.attr("is_cpu").cast<bool>();
    return t.attr("is_cuda").cast<bool>() && t.attr("get_device")().cast<int32_t>() == device_.index;
  }

  dlpack::ExchangeApi* api_ = nullptr;
  Device device_;
  std::map<std::string, py::object> dtypes_;  // torch's, by name
};

}  // namespace danlu
