// danlu._cpu: the plan of a step over CPU tensors, and the one parallel region that runs it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "address_list.h"
#include "coefficient_rows.h"
#include "cpu/instruction_sets.h"
#include "cpu/lazy_tensors.h"
#include "cpu/reducing_tensors.h"
#include "cpu/stream.h"
#include "cpu/sum_squares.h"
#include "cpu/threads.h"
#include "step_list.h"

namespace danlu {

class CpuStep : public StepList {
 public:
  CpuStep(const py::object& exchange_api, const py::module_& torch, const py::object& sharded_type,
          std::string isa)
      : StepList(exchange_api, torch, sharded_type, Device{dlpack::cpu, 0}, Counters::on_host),
        isa_(std::move(isa)) {}

  void add(const py::object& entry) {
    const auto name = entry.attr("rule").cast<std::string>();
    const CpuRule* rule = find_rule(name, isa_);
    if (!rule) throw py::value_error("no native rule " + name);
    StepList::add(entry, rule->info.num_states);
    row_stride_ = std::max(row_stride_, rule->info.row_length());
    const int tensor = int(kernels_.size());
    const py::object lazy = entry.attr("lazy");
    kernels_.push_back(lazy.is_none() ? rule->kernel : nullptr);
    if (!lazy.is_none())
      lazy_.add(tensor, rule->kernel, entry.attr("shape").cast<std::vector<int64_t>>(),
                lazy.cast<std::string>() == "params");
    else if (rule->kernel)
      elementwise_ = true;
    else if (tensors()[tensor].size > 0)
      reducing_.add(tensor, rule->reducer, entry.attr("matrix").cast<std::array<int64_t, 3>>());
  }

  // After the last add(): cuts the tensors into claims of about claim_size elements, small tensors together.
  void bind(const py::dict& state) {
    StepList::bind(state);
    reducing_.bind();
    chunks_.clear();
    claims_ = {0};
    int64_t filled = 0;
    for (size_t i = 0; i < tensors().size(); i++)
      for (int64_t begin = 0; begin < tensors()[i].size; begin += claim_size) {
        const int64_t end = std::min(tensors()[i].size, begin + claim_size);
        if (filled + end - begin > claim_size && filled > 0) {
          claims_.push_back(chunks_.size());
          filled = 0;
        }
        chunks_.push_back({kernels_[i], int32_t(i), begin, end});
        filled += end - begin;
      }
    if (filled > 0) claims_.push_back(chunks_.size());
  }

  // Of the gradients that gather() found, in an order that does not depend on the threads.
  double gradient_squares(int threads) {
    const py::gil_scoped_release nogil;
    const int64_t claims = int64_t(claims_.size()) - 1;
    // a core that only reads reaches its speed after some hundred KB
    constexpr int64_t together = 4;
    partial_sums_.assign(claims, 0.0);
    parallel_claims(divided_up(claims, together), threads, [&](int64_t first) {
      for (int64_t claim = first * together; claim < std::min(claims, (first + 1) * together); claim++)
        for (size_t c = claims_[claim]; c < claims_[claim + 1]; c++) {
          const Tensor& t = tensors()[chunks_[c].tensor];
          if (t.row >= 0 && !lists(chunks_[c].tensor))
            partial_sums_[claim] += sum_squares(t.g, chunks_[c].begin, chunks_[c].end);
        }
    });
    const double of_lists = lazy_.squares(tensors(), listed(), threads);
    return std::accumulate(partial_sums_.begin(), partial_sums_.end(), of_lists);
  }

  // rows: one sequence of float64 numbers for each key that gather() gave, in its order; each is rounded once
  // to fp32.
  void run(const py::list& rows, int threads) {
    rows_.assign(rows, row_stride_);
    const py::gil_scoped_release nogil;
    advance();
    reducing_.start(tensors(), rows_, threads);
    lazy_.start(tensors(), listed(), rows_, threads);
    const int64_t reducing = reducing_.claims(), lazy = lazy_.claims();
    const int64_t elementwise = elementwise_ ? int64_t(claims_.size()) - 1 : 0;
    parallel_claims(reducing + lazy + elementwise, threads, [&](int64_t claim) {
      if (claim < reducing) return reducing_.work(claim);
      claim -= reducing;
      if (claim < lazy) return lazy_.work(claim);
      claim -= lazy;
      for (size_t c = claims_[claim]; c < claims_[claim + 1]; c++) {
        const Chunk& chunk = chunks_[c];
        const Tensor& t = tensors()[chunk.tensor];
        if (t.row >= 0 && chunk.kernel) chunk.kernel(t, chunk.begin, chunk.end, rows_[t.row]);
      }
    });
  }

  // Beside parameters, gradients and states.
  int64_t scratch_bytes(int threads) const { return reducing_.scratch_bytes(threads); }

 private:
  static constexpr int64_t claim_size = 65536;

  struct Chunk {
    Kernel kernel;
    int32_t tensor;
    int64_t begin, end;
  };

  bool lists(int tensor) const {
    return std::any_of(listed().begin(), listed().end(), [&](const auto& l) { return l.tensor == tensor; });
  }

  std::string isa_;
  int row_stride_ = 0;           // the longest row's length
  std::vector<Kernel> kernels_;  // null where the rule reduces or the tensor is lazy
  bool elementwise_ = false;     // whether any rule is
  ReducingTensors reducing_;
  LazyTensors lazy_;
  std::vector<Chunk> chunks_;
  std::vector<size_t> claims_;  // claim i is chunks [claims_[i], claims_[i + 1])
  CoefficientRows rows_;
  std::vector<double> partial_sums_;  // of each claim
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
  m.def("instruction_sets", &instruction_set_names, "Those that this machine can run, the fastest first.");
  m.def("coefficient_names", &coefficient_names,
        "The coefficients of a rule in order; None if there is no such rule.");
  m.def("stream", &stream, py::call_guard<py::gil_scoped_release>(),
        "In-place stream over fp32 arrays, the yardstick of the benchmarks.");
  m.def("read_through", &read_through, py::call_guard<py::gil_scoped_release>(),
        "Reads an fp32 array and returns the exclusive or of its elements' bits; another yardstick.");
  m.def("rounded_rows", &rounded_rows, "Rows of numbers as bytes of fp32, padded to a length.");
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
      .def("run", &CpuStep::run);
}
