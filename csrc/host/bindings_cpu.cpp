// danlu._cpu: the host's half of a step over CPU tensors, and the engine that runs it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../cpu/bandwidth_ceiling.h"
#include "../cpu/instruction_sets.h"
#include "../cpu/step.h"
#include "address_list.h"
#include "python_values.h"
#include "step_list.h"

namespace danlu {

class CpuStep : public StepList {
 public:
  CpuStep(const py::object& exchange_api, const py::module_& torch, const py::object& sharded_type,
          std::string isa)
      : StepList(exchange_api, torch, sharded_type, Device{dlpack::cpu, 0}, Counters::on_host),
        isa_(std::move(isa)) {}

  void add(const py::object& spec) {
    const auto name = spec.attr("rule").cast<std::string>();
    const CpuRule* rule = find_rule(name, isa_);
    if (!rule) throw py::value_error("no native rule " + name);
    StepList::add(spec, rule->info.num_states);
    stride_ = std::max(stride_, rule->info.num_floats());
    const py::object lazy = spec.attr("sparse_mode");
    if (!lazy.is_none())
      step_.add_lazy(rule->kernel, spec.attr("shape").cast<std::vector<int64_t>>(),
                     lazy.cast<std::string>() == "params");
    else if (rule->kernel)
      step_.add_elementwise(rule->kernel);
    else
      step_.add_reducing(rule->reducer, spec.attr("matrix").cast<std::array<int64_t, 3>>());
  }

  // After the last add().
  void bind(const py::dict& state) {
    StepList::bind(state);
    step_.bind(tensors());
  }

  // Of the gradients that refresh() found.
  double gradient_squares(int threads) {
    const py::gil_scoped_release nogil;
    return step_.gradient_squares(tensors(), listed(), threads);
  }

  // coefficients: one sequence of float64 numbers for each key that refresh() gave, in its order; each is
  // rounded once to fp32.
  void run(const py::list& coefficients, int threads) {
    read_coefficients(coefficients, stride_, coefficients_);
    const py::gil_scoped_release nogil;
    advance();
    step_.run(tensors(), listed(), coefficients_, threads);
  }

  // run() in three parts: between them sums() shows the sums of rules that reduce, which may be changed.
  void reduce_gradient(const py::list& coefficients, int threads) {
    read_coefficients(coefficients, stride_, coefficients_);
    const py::gil_scoped_release nogil;
    step_.rounds().reduce_gradient(tensors(), coefficients_, threads);
  }

  // coefficients: as many as before
  void reduce_norms(const py::list& coefficients, int threads) {
    read_coefficients(coefficients, stride_, coefficients_);
    const py::gil_scoped_release nogil;
    step_.rounds().reduce_norms(coefficients_, threads);
  }

  void apply(int threads) {
    const py::gil_scoped_release nogil;
    advance();
    step_.apply(tensors(), listed(), coefficients_, threads);
  }

  // What a tensor leaves after reduce_gradient() (stop 0) or reduce_norms() (1): (of what, as
  // ReducingRounds::Array has it; float64 numbers as bytes). They are there as long as scratch() is the same.
  std::vector<std::pair<std::string, py::memoryview>> sums(int tensor, int stop) {
    std::vector<std::pair<std::string, py::memoryview>> found;
    for (const auto& array : step_.rounds().sums(tensor, stop))
      found.emplace_back(array.of, py::memoryview::from_memory(array.values, array.count * sizeof(double)));
    return found;
  }

  // The address of all sums, after reduce_gradient().
  uintptr_t scratch() { return reinterpret_cast<uintptr_t>(step_.rounds().scratch()); }

  // The sums of a tensor are those of a larger one, of so many rows, columns, elements, from now on.
  void count(int tensor, int64_t rows, int64_t columns, int64_t size) {
    step_.rounds().count(tensor, {rows, columns, size});
  }

  // Beside parameters, gradients and states.
  int64_t scratch_bytes(int threads) const { return step_.scratch_bytes(threads); }

 private:
  std::string isa_;
  int stride_ = 0;  // floats of the longest set
  ParallelStep step_;
  CoefficientTable coefficients_;
};

std::vector<std::string> instruction_set_names() {
  std::vector<std::string> names;
  for (const InstructionSet& set : instruction_sets()) names.push_back(set.name);
  return names;
}

py::object coefficient_names(const std::string& rule) {
  const CpuRule* found = find_rule(rule, "baseline");
  return found ? py::object(split_names(found->info.coeff_names)) : py::none();
}

}  // namespace danlu

PYBIND11_MODULE(_cpu, m) {
  using namespace danlu;
  m.doc() = "Native CPU kernels of danlu.";
  m.attr("num_zeros") = num_zeros;
  m.attr("formats") = format_table();
  m.def("instruction_sets", &instruction_set_names, "Those that this machine can run, the fastest first.");
  m.def("coefficient_names", &coefficient_names,
        "The coefficients of a rule in order; None if there is no such rule.");
  m.def("bandwidth_ceiling", &bandwidth_ceiling, py::call_guard<py::gil_scoped_release>(),
        "The bandwidth ceiling: updates fp32 arrays in place and does nothing else.");
  m.def("read_through", &read_through, py::call_guard<py::gil_scoped_release>(),
        "Reads an fp32 array and returns the exclusive or of its elements' bits: the ceiling of a norm.");
  m.def("rounded_coefficients", &rounded_coefficients,
        "Rows of numbers as bytes of fp32, padded to a length.");
  step_list_class<AddressList>(m, "AddressList")
      .def(py::init<py::object, py::module_, py::object, std::pair<int, int>, bool>())
      .def("advance", &AddressList::advance)
      .def("select", &AddressList::select)
      .def("table", &AddressList::table)
      .def("lazy_table", &AddressList::lazy_table)
      .def("gradients", &AddressList::gradients);
  step_list_class<CpuStep>(m, "Step")
      .def(py::init<py::object, py::module_, py::object, std::string>())
      .def("gradient_squares", &CpuStep::gradient_squares)
      .def("scratch_bytes", &CpuStep::scratch_bytes)
      .def("reduce_gradient", &CpuStep::reduce_gradient)
      .def("reduce_norms", &CpuStep::reduce_norms)
      .def("apply", &CpuStep::apply)
      .def("sums", &CpuStep::sums)
      .def("scratch", &CpuStep::scratch)
      .def("count", &CpuStep::count)
      .def("run", &CpuStep::run);
}
