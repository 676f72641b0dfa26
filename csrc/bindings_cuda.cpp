// danlu._cuda: the plan of a step over CUDA tensors, and its launches. For tests the same text is built a
// second time with the emulator in place of the CUDA runtime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "address_list.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/norm.h"
#include "cuda/pass_list.h"
#include "cuda/stream.h"

#if defined(DANLU_EMULATOR)
#include "emulator/bindings.h"
#endif

namespace danlu {

const CudaRule* find_rule(const std::string& name) {
  static const std::vector<CudaRule> rules = cuda_rules();
  for (const CudaRule& rule : rules)
    if (name == rule.info.name) return &rule;
  return nullptr;
}

const RuleInfo* find_info(const std::string& name) {
  if (const CudaRule* rule = find_rule(name)) return &rule->info;
  const ReducingRule* rule = find_reducing_rule(name);
  return rule ? &rule->info : nullptr;
}

// dtypes of parameter, gradient and states; nullptr if no kernel was compiled for them
const CudaKernel* find_kernel(const CudaRule& rule, const std::vector<std::string>& dtypes) {
  return find_formats(rule.kernels, rule.info.num_states, 0, dtypes);
}

class CudaStep : public AddressList {
 public:
  // device_index < 0: tensors on the CPU, for the emulator
  CudaStep(const py::object& exchange_api, const py::module_& torch, const py::object& sharded_type,
           int device_index, bool counters_on_device)
      : AddressList(exchange_api, torch, sharded_type,
                    device_index < 0 ? std::pair(dlpack::cpu, 0) : std::pair(dlpack::cuda, device_index),
                    counters_on_device),
        device_(std::max(device_index, 0)) {}

  // A tensor whose rule reduces is only gathered and counted here: a PassList launches its kernels.
  void add(const py::object& entry) {
    const auto name = entry.attr("rule").cast<std::string>();
    const CudaRule* rule = find_rule(name);
    const CudaKernel* kernel = nullptr;
    if (rule) {
      kernel = find_kernel(*rule, entry.attr("dtypes").cast<std::vector<std::string>>());
      if (!kernel) throw py::value_error("no CUDA kernel of " + name + " for these dtypes");
    } else if (!find_info(name)) {
      throw py::value_error("no CUDA rule " + name);
    }
    AddressList::add(entry);
    kernels_.push_back({rule, kernel});
    names_.push_back(entry.attr("name").cast<std::string>());
    row_stride_ = std::max(row_stride_, find_info(name)->row_length());
  }

  // After the last add(): brings tensors of one kernel together. Empty ones have nothing to launch for.
  void bind(const py::dict& state) {
    StepList::bind(state);
    order_.clear();
    for (size_t i = 0; i < kernels_.size(); i++)
      if (kernels_[i].second && tensors()[i].size > 0) order_.push_back(i);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return kernels_[a].second < kernels_[b].second; });
  }

  // How many float64 numbers norm() needs.
  int64_t num_squares() const {
    int64_t chunks = 0;
    for (const Tensor& t : tensors()) chunks += norm_chunks(t);
    return chunks;
  }

  // Enqueues the norm over all gradients that gather() read. squares: the address of num_squares() numbers on
  // the device, norm: of a Norm there, grad_scale: of an fp32 number there, or 0.
  void norm(uintptr_t stream, uintptr_t squares, uintptr_t norm, double max_norm, uintptr_t grad_scale) {
    const py::gil_scoped_release nogil;
    const DeviceGuard guard(device_);
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    double* const first = reinterpret_cast<double*>(squares);
    double* next = first;
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      LaunchPacker packer(0, 0, norm_chunk, nullptr);
      const auto enqueue = [&] {
        if (packer.empty()) return;
        check_launch(launch_squares(dtype, packer, on), names_[first_], 0);
        packer.clear();
      };
      for (size_t i = 0; i < tensors().size(); i++) {
        const Tensor& t = tensors()[i];
        if (t.row < 0 || t.g.dtype != dtype) continue;
        Tensor with_sums = {};
        with_sums.p.data = next;
        with_sums.g = t.g;
        with_sums.size = gradient_size(i);
        if (with_sums.size == 0) continue;
        if (!packer.add(with_sums, nullptr)) {
          enqueue();
          packer.add(with_sums, nullptr);
        }
        if (packer.num_tensors() == 1) first_ = i;
        next += norm_chunks(with_sums);
      }
      enqueue();
    }
    check_launch(launch_norm(first, next - first, max_norm, reinterpret_cast<const float*>(grad_scale),
                             reinterpret_cast<Norm*>(norm), on),
                 names_[0], 0);
  }

  // Enqueues the element-wise step on a stream, counts the step for all tensors, and returns the number of
  // launches, with the `launches` that were made before. rows: as CpuStep::run, without counters on the
  // device; then device_rows is the address of an fp32 row for each tensor added. clip, found_inf: addresses
  // of fp32 numbers on the device, or 0. With lazy parameters whose moments all move, resting is how far
  // behind the coefficient row of their listed rows that of the others is, and zeros the address of num_zeros
  // fp32 zeros on the device.
  int run(const py::list& rows, uintptr_t stream, uintptr_t device_rows, uintptr_t clip, uintptr_t found_inf,
          int resting, uintptr_t zeros, int launches) {
    rows_.assign(rows, row_stride_);
    const py::gil_scoped_release nogil;
    const DeviceGuard guard(device_);
    for (size_t next = 0, end; next < order_.size(); next = end) {
      const CudaRule* rule = kernels_[order_[next]].first;
      const CudaKernel* kernel = kernels_[order_[next]].second;
      const int num_states = rule->info.num_states;
      LaunchPacker packer(num_states, device_rows ? row_stride_ : rule->info.row_length(), rule->chunk_size,
                          reinterpret_cast<const float*>(device_rows));
      packer.head().clip = reinterpret_cast<const float*>(clip);
      packer.head().found_inf = reinterpret_cast<const float*>(found_inf);
      const auto add = [&](const Tensor& t, size_t i) {
        const float* coefficients = device_rows ? nullptr : rows_[t.row];
        if (!packer.add(t, coefficients)) {
          enqueue(*kernel, packer, stream, launches++);
          packer.clear();
          packer.add(t, coefficients);
        }
        if (packer.num_tensors() == 1) first_ = i;
      };
      for (end = next; end < order_.size() && kernels_[order_[end]].second == kernel;) end++;
      for_launched(order_.begin() + next, order_.begin() + end, num_states, resting, zeros, add);
      if (!packer.empty()) enqueue(*kernel, packer, stream, launches++);
    }
    advance();
    return launches;
  }

 private:
  void enqueue(const CudaKernel& kernel, LaunchPacker& packer, uintptr_t stream, int launches) const {
    check_launch(kernel.launch(packer, reinterpret_cast<cudaStream_t>(stream)), names_[first_], launches);
  }

  static int64_t norm_chunks(const Tensor& t) { return (t.size + norm_chunk - 1) / norm_chunk; }

  int device_;
  std::vector<std::pair<const CudaRule*, const CudaKernel*>> kernels_;  // of each tensor
  std::vector<std::string> names_;
  std::vector<size_t> order_;  // tensors with elements, those of one kernel together
  CoefficientRows rows_;
  int row_stride_ = 0;  // the longest row's length
  size_t first_ = 0;    // the first tensor of the launch being packed
};

py::object coefficient_names(const std::string& rule) {
  const RuleInfo* found = find_info(rule);
  return found ? py::object(split_names(found->coeff_names)) : py::none();
}

bool has_kernel(const std::string& rule, const std::vector<std::string>& dtypes) {
  if (const CudaRule* found = find_rule(rule)) return find_kernel(*found, dtypes);
  const ReducingRule* found = find_reducing_rule(rule);
  return found && find_passes(*found, dtypes);
}

// As schedule.Reduction has them: along, sums, row_by_row. None for an element-wise rule.
py::object reduction(const std::string& rule) {
  const ReducingRule* found = find_reducing_rule(rule);
  if (!found) return py::none();
  return py::make_tuple(found->along, found->num_sums, found->row_by_row);
}

// What run() would launch for tensors of these sizes with these coefficient rows: (tensors, blocks) each.
std::vector<std::pair<int, int64_t>> launch_plan(const std::string& rule, const std::vector<int64_t>& sizes,
                                                 const std::vector<int>& rows, bool rows_on_device) {
  const CudaRule* found = find_rule(rule);
  if (!found || sizes.size() != rows.size())
    throw py::value_error("no such rule, or not a row for each size");
  const std::vector<float> row(found->info.row_length());
  LaunchPacker packer(found->info.num_states, int(row.size()), found->chunk_size,
                      rows_on_device ? row.data() : nullptr);
  std::vector<std::pair<int, int64_t>> launches;
  for (size_t i = 0; i < sizes.size(); i++) {
    if (sizes[i] == 0) continue;
    Tensor t = {};
    t.size = sizes[i];
    t.row = rows[i];
    if (packer.add(t, row.data())) continue;
    launches.emplace_back(packer.num_tensors(), packer.num_blocks());
    packer.clear();
    packer.add(t, row.data());
  }
  if (!packer.empty()) launches.emplace_back(packer.num_tensors(), packer.num_blocks());
  return launches;
}

}  // namespace danlu

PYBIND11_MODULE(DANLU_MODULE, m) {
  using namespace danlu;
  m.doc() = "Native CUDA kernels of danlu.";
  m.attr("architectures") = DANLU_CUDA_ARCHITECTURES;
  m.def("unavailable", &unavailable, "Why no device can be used; None if one can.");
  m.def("capability", &capability, "Compute capability of a device, 90 for 9.0.");
  m.def("coefficient_names", &coefficient_names,
        "The coefficients of a rule in order; None if there is no such rule.");
  m.def("has_kernel", &has_kernel, "Whether a rule was compiled for dtypes of parameter, gradient, states.");
  m.def("launch_plan", &launch_plan,
        "(tensors, blocks) of each launch over tensors of these sizes and rows.");
  m.def("stream", &stream, py::call_guard<py::gil_scoped_release>(),
        "In-place stream over fp32 arrays, the yardstick of the benchmarks.");
  m.def("read_through", &read_through, py::call_guard<py::gil_scoped_release>(),
        "Reads an fp32 array and does nothing else: the ceiling of a norm.");
  m.def("reduction", &reduction, "What a rule sums before its step; None if nothing.");
  m.attr("geometry_fields") = split_names(geometry_fields);
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
