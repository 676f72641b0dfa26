// danlu._cuda: the host's half of a step over CUDA tensors, and the engine that launches it. For tests the
// same text is built a second time with the emulator in place of the CUDA runtime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/bandwidth_ceiling.h"
#include "../cuda/device.h"
#include "../cuda/launches.h"
#include "../cuda/pass_list.h"
#include "../cuda/sum_parts.h"
#include "address_list.h"
#include "python_values.h"

#if defined(DANLU_EMULATOR)
#include "../emulator/bindings.h"
#endif

namespace danlu {

const RuleInfo* find_info(const std::string& name) {
  if (const CudaRule* rule = find_rule(name)) return &rule->info;
  const ReducingRule* rule = find_reducing_rule(name);
  return rule ? &rule->info : nullptr;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

class CudaStep : public AddressList {
 public:
  // device_index < 0: tensors on the CPU, for the emulator
  CudaStep(const py::object& exchange_api, const py::module_& torch, const py::object& sharded_type,
           int device_index, bool counters_on_device)
      : AddressList(exchange_api, torch, sharded_type,
                    device_index < 0 ? std::pair(dlpack::cpu, 0) : std::pair(dlpack::cuda, device_index),
                    counters_on_device),
        launches_(std::max(device_index, 0)) {}

  // A tensor whose rule reduces is only refreshed and counted here: a PassList launches its kernels.
  void add(const py::object& spec) {
    const auto name = spec.attr("rule").cast<std::string>();
    const CudaRule* rule = find_rule(name);
    const CudaKernel* kernel = nullptr;
    if (rule) {
      kernel = find_kernel(rule->kernels, spec.attr("formats").cast<std::vector<std::string>>());
      if (!kernel) throw py::value_error("no CUDA kernel of " + name + " for these formats");
    } else if (!find_info(name)) {
      throw py::value_error("no CUDA rule " + name);
    }
    AddressList::add(spec);
    launches_.add(spec.attr("name").cast<std::string>(), rule, kernel);
    stride_ = std::max(stride_, find_info(name)->num_floats());
  }

  // After the last add().
  void bind(const py::dict& state) {
    StepList::bind(state);
    launches_.bind(tensors());
  }

  // How many float64 numbers norm() needs.
  int64_t num_squares() const { return Launches::num_squares(tensors()); }

  // Enqueues the norm over all gradients that refresh() read. squares: the address of num_squares() numbers
  // on the device, norm: of a Norm there, grad_scale: of an fp32 number there, or 0.
  void norm(uintptr_t stream, uintptr_t squares, uintptr_t norm, double max_norm, uintptr_t grad_scale) {
    const py::gil_scoped_release nogil;
    launches_.norm(launched(), at<CUstream_st>(stream), at<double>(squares), at<Norm>(norm), max_norm,
                   at<const float>(grad_scale));
  }

  // Enqueues the element-wise step on a stream, counts the step for all tensors, and returns the number of
  // launches, with the `launches` that were made before. rows: as CpuStep::run, without counters on the
  // device; then device_coefficients is the address of an fp32 row for each tensor added. clip, found_inf:
  // addresses of fp32 numbers on the device, or 0. With lazy parameters whose moments all move, idle is how
  // far behind the coefficients of their listed rows that of the others is, and zeros the address of
  // num_zeros fp32 zeros on the device.
  int run(const py::list& coefficients, uintptr_t stream, uintptr_t device_coefficients, uintptr_t clip,
          uintptr_t found_inf, int idle, uintptr_t zeros, int launches) {
    read_coefficients(coefficients, stride_, coefficients_);
    const py::gil_scoped_release nogil;
    const StepNumbers numbers = {at<const float>(device_coefficients), at<const float>(clip),
                                 at<const float>(found_inf)};
    launches = launches_.run(launched(), coefficients_, stride_, numbers, at<CUstream_st>(stream), idle,
                             zeros, launches);
    advance();
    return launches;
  }

 private:
  Launches launches_;
  CoefficientTable coefficients_;
  int stride_ = 0;  // floats of the longest set
};

py::object why_unavailable() {
  const std::string reason = unavailable();
  return reason.empty() ? py::object(py::none()) : py::str(reason);
}

py::object coefficient_names(const std::string& rule) {
  const RuleInfo* found = find_info(rule);
  return found ? py::object(split_names(found->coeff_names)) : py::none();
}

bool has_kernel(const std::string& rule, const std::vector<std::string>& formats) {
  if (const CudaRule* found = find_rule(rule)) return find_kernel(found->kernels, formats);
  const ReducingRule* found = find_reducing_rule(rule);
  return found && find_kernel(found->kernels, formats);
}

// As schedule.Reduction has them: along, sums, row_by_row. None for an element-wise rule.
py::object reduction(const std::string& rule) {
  const ReducingRule* found = find_reducing_rule(rule);
  if (!found) return py::none();
  return py::make_tuple(found->along, found->num_sums, found->row_by_row);
}

std::vector<std::pair<int, int64_t>> planned(const std::string& rule, const std::vector<int64_t>& sizes,
                                             const std::vector<int>& sets, bool on_device) {
  const CudaRule* found = find_rule(rule);
  if (!found || sizes.size() != sets.size())
    throw py::value_error("no such rule, or not a set for each size");
  return launch_plan(*found, sizes, sets, on_device);
}

}  // namespace danlu

PYBIND11_MODULE(DANLU_MODULE, m) {
  using namespace danlu;
  m.doc() = "Native CUDA kernels of danlu.";
  m.attr("architectures") = DANLU_CUDA_ARCHITECTURES;
  m.attr("combinations") = DANLU_CUDA_COMBINATIONS;  // rules that have all of them, or "all"
  m.def("unavailable", &why_unavailable, "Why no device can be used; None if one can.");
  m.def("capability", &capability, "Compute capability of a device, 90 for 9.0.");
  m.def("coefficient_names", &coefficient_names,
        "The coefficients of a rule in order; None if there is no such rule.");
  m.def("has_kernel", &has_kernel, "Whether a rule was compiled for formats of parameter, gradient, states.");
  m.def("launch_plan", &planned, "(tensors, blocks) of each launch over tensors of these sizes and sets.");
  m.def("bandwidth_ceiling", &bandwidth_ceiling, py::call_guard<py::gil_scoped_release>(),
        "The bandwidth ceiling: updates fp32 arrays in place and does nothing else.");
  m.def("read_through", &read_through, py::call_guard<py::gil_scoped_release>(),
        "Reads an fp32 array and does nothing else: the ceiling of a norm.");
  m.def("reduction", &reduction, "What a rule sums before its step; None if nothing.");
  m.def("sum_parts", &sum_parts, py::call_guard<py::gil_scoped_release>(),
        "Where a step stops: adds up what tiles and chunks have left, in one launch.");
  m.attr("geometry_fields") = split_names(geometry_fields);
  m.attr("summation_fields") = split_names(summation_fields);
  step_list_class<CudaStep>(m, "Step")
      .def(py::init<py::object, py::module_, py::object, int, bool>())
      .def("select", &CudaStep::select)
      .def("table", &CudaStep::table)
      .def("num_squares", &CudaStep::num_squares)
      .def("norm", &CudaStep::norm)
      .def("run", &CudaStep::run);
  py::class_<PassList>(m, "PassList", py::module_local())
      .def(py::init<std::string, std::vector<std::string>, std::string, int, int, uintptr_t, uintptr_t>())
      .def_readwrite("dependent", &PassList::dependent)
      .def("add", &PassList::add)
      .def("run", &PassList::run, py::call_guard<py::gil_scoped_release>());
#if defined(DANLU_EMULATOR)
  bind_emulator(m);
#endif
}
