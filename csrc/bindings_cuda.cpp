// danlu._cuda: the plan of a step over CUDA tensors, and its launches. For tests the same text is built a
// second time with the emulator in place of the CUDA runtime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "coefficient_rows.h"
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/stream.h"
#include "step_list.h"

#if defined(DANLU_EMULATOR)
#include "emulator/bindings.h"
#endif

namespace danlu {

const std::vector<CudaRule>& all_rules() {
  static const std::vector<CudaRule> rules = cuda_rules();
  return rules;
}

const CudaRule* find_rule(const std::string& name) {
  for (const CudaRule& rule : all_rules())
    if (name == rule.info.name) return &rule;
  return nullptr;
}

// dtypes of parameter, gradient and states; nullptr if no kernel was compiled for them
const CudaKernel* find_kernel(const CudaRule& rule, const std::vector<std::string>& dtypes) {
  if (int(dtypes.size()) != 2 + rule.info.num_states) return nullptr;
  for (size_t i = 3; i < dtypes.size(); i++)
    if (dtypes[i] != "float32") return nullptr;
  const auto is = [](const std::string& name, Dtype dtype) {
    return name == (dtype == Dtype::f32 ? "float32" : dtype == Dtype::bf16 ? "bfloat16" : "float16");
  };
  for (const CudaKernel& kernel : rule.kernels)
    if (is(dtypes[0], kernel.p) && is(dtypes[1], kernel.g) && is(dtypes[2], kernel.m)) return &kernel;
  return nullptr;
}

class CudaStep : public StepList {
 public:
  // device_index < 0: tensors on the CPU, for the emulator
  CudaStep(const py::object& exchange_api, const py::module_& torch, const py::object& sharded_type,
           int device_index, bool counters_on_device)
      : StepList(exchange_api, torch, sharded_type,
                 device_index < 0 ? Device{dlpack::cpu, 0} : Device{dlpack::cuda, device_index},
                 counters_on_device ? Counters::on_device : Counters::on_host),
        device_(std::max(device_index, 0)) {}

  void add(const py::object& entry) {
    const auto name = entry.attr("rule").cast<std::string>();
    const CudaRule* rule = find_rule(name);
    if (!rule) throw py::value_error("no CUDA rule " + name);
    const CudaKernel* kernel = find_kernel(*rule, entry.attr("dtypes").cast<std::vector<std::string>>());
    if (!kernel) throw py::value_error("no CUDA kernel of " + name + " for these dtypes");
    StepList::add(entry, rule->info.num_states);
    kernels_.push_back({rule, kernel});
    names_.push_back(entry.attr("name").cast<std::string>());
    row_stride_ = std::max(row_stride_, rule->info.row_length());
  }

  // After the last add(): brings tensors of one kernel together. Empty ones have nothing to launch for.
  void bind(const py::dict& state) {
    StepList::bind(state);
    order_.clear();
    for (size_t i = 0; i < kernels_.size(); i++)
      if (tensors()[i].size > 0) order_.push_back(i);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return kernels_[a].second < kernels_[b].second; });
  }

  // Enqueues the step on a stream and returns the number of launches. rows: as CpuStep::run, without counters
  // on the device; then device_rows is the address of an fp32 row for each tensor added. clip, found_inf:
  // addresses of fp32 numbers on the device, or 0.
  int run(const py::list& rows, uintptr_t stream, uintptr_t device_rows, uintptr_t clip,
          uintptr_t found_inf) {
    rows_.assign(rows, row_stride_);
    const py::gil_scoped_release nogil;
    const DeviceGuard guard(device_);
    int launches = 0;
    for (size_t next = 0; next < order_.size();) {
      const auto [rule, kernel] = kernels_[order_[next]];
      LaunchPacker packer(rule->info.num_states, device_rows ? row_stride_ : rule->info.row_length(),
                          rule->chunk_size, reinterpret_cast<const float*>(device_rows));
      packer.list().clip = reinterpret_cast<const float*>(clip);
      packer.list().found_inf = reinterpret_cast<const float*>(found_inf);
      for (; next < order_.size() && kernels_[order_[next]].second == kernel; next++) {
        const Tensor& t = tensors()[order_[next]];
        if (t.row < 0) continue;
        const float* coefficients = device_rows ? nullptr : rows_[t.row];
        if (packer.add(t, coefficients)) {
          if (packer.num_tensors() == 1) first_ = order_[next];
          continue;
        }
        enqueue(*kernel, packer, stream, launches++);
        packer.clear();
        packer.add(t, coefficients);
        first_ = order_[next];
      }
      if (!packer.empty()) enqueue(*kernel, packer, stream, launches++);
    }
    advance();
    return launches;
  }

 private:
  void enqueue(const CudaKernel& kernel, LaunchPacker& packer, uintptr_t stream, int launches) const {
    const cudaError_t error =
        kernel.launch(packer.list(), unsigned(packer.num_blocks()), reinterpret_cast<cudaStream_t>(stream));
    if (error == cudaSuccess) return;
    cudaGetLastError();  // this one is told, it shall not show up again elsewhere
    throw std::runtime_error(names_[first_] +
                             ": the CUDA kernel could not be launched: " + cudaGetErrorString(error) +
                             (launches ? "; earlier launches of this step have been made" : ""));
  }

  int device_;
  std::vector<std::pair<const CudaRule*, const CudaKernel*>> kernels_;  // of each tensor
  std::vector<std::string> names_;
  std::vector<size_t> order_;  // tensors with elements, those of one kernel together
  CoefficientRows rows_;
  int row_stride_ = 0;  // the longest row's length
  size_t first_ = 0;    // the first tensor of the launch being packed
};

py::object coefficient_names(const std::string& rule) {
  const CudaRule* found = find_rule(rule);
  return found ? py::object(split_names(found->info.coeff_names)) : py::none();
}

bool has_kernel(const std::string& rule, const std::vector<std::string>& dtypes) {
  const CudaRule* found = find_rule(rule);
  return found && find_kernel(*found, dtypes);
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
  step_list_class<CudaStep>(m, "Step")
      .def(py::init<py::object, py::module_, py::object, int, bool>())
      .def("run", &CudaStep::run);
#if defined(DANLU_EMULATOR)
  bind_emulator(m);
#endif
}
