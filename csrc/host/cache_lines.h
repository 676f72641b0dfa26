// The cache lines that views of tensors read. Only hints: should torch have moved something, a step loses
// time, not correctness.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace danlu {

namespace py = pybind11;

class CacheLines {
 public:
  size_t size() const { return lines_.size(); }

  void add(py::object tensor, bool sharded) {
    if (sharded) tensor = tensor.attr("_local_tensor");
    const py::object storage = tensor.attr("untyped_storage")();
    add(reinterpret_cast<uintptr_t>(tensor.ptr()), 1);
    add(py::getattr(tensor, "_cdata", py::int_(0)).cast<uintptr_t>(), 4);
    add(py::getattr(storage, "_cdata", py::int_(0)).cast<uintptr_t>(), 2);
  }

  void ask_for(size_t first, size_t count) const {
    for (size_t i = first; i < first + count; i++) __builtin_prefetch(lines_[i]);
  }

 private:
  void add(uintptr_t address, int count) {
    for (int i = 0; address && i < count; i++)
      lines_.push_back(reinterpret_cast<const char*>(address) + 64 * i);
  }

  std::vector<const char*> lines_;
};

}  // namespace danlu
