// The launches of a step that takes each element by itself, and those of a norm: packs tensors until a launch
// is full.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../common/coefficient_table.h"
#include "../common/lazy_rows.h"
#include "device.h"
#include "kernels.h"
#include "norm.h"
#include "pass_list.h"

namespace danlu {

inline const CudaRule* find_rule(const std::string& name) {
  static const std::vector<CudaRule> rules = cuda_rules();
  for (const CudaRule& rule : rules)
    if (name == rule.info.name) return &rule;
  return nullptr;
}

// Numbers of one step, by their addresses on the device.
struct StepNumbers {
  const float* coefficients;  // a coefficients for each tensor, or null: the host has them
  const float* clip;          // or null; multiplies every gradient
  const float* found_inf;     // or null; where it is not 0 nothing is written
};

class Launches {
 public:
  explicit Launches(int device) : device_(device) {}

  // name: of the parameter. kernel: null where a PassList launches the rule's.
  void add(const std::string& name, const CudaRule* rule, const CudaKernel* kernel) {
    names_.push_back(name);
    kernels_.push_back({rule, kernel});
  }

  // After the last add(): brings tensors of one kernel together. Empty ones have nothing to launch for.
  void bind(const std::vector<Tensor>& tensors) {
    order_.clear();
    for (size_t i = 0; i < kernels_.size(); i++)
      if (kernels_[i].second && tensors[i].size > 0) order_.push_back(i);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return kernels_[a].second < kernels_[b].second; });
  }

  // Enqueues the step on a stream; returns the number of launches, with the `made` of this step before.
  // coefficients: from the host, where the device has none. idle, zeros: as LaunchedTensors::for_each().
  int run(const LaunchedTensors& launched, const CoefficientTable& coefficients, int stride,
          const StepNumbers& numbers, cudaStream_t stream, int idle, uintptr_t zeros, int made) {
    const DeviceGuard guard(device_);
    for (size_t next = 0, end; next < order_.size(); next = end) {
      const auto [rule, kernel] = kernels_[order_[next]];
      const int num_states = rule->info.num_states;
      LaunchPacker packer(num_states, numbers.coefficients ? stride : rule->info.num_floats(),
                          rule->chunk_size, numbers.coefficients);
      packer.head().clip = numbers.clip;
      packer.head().found_inf = numbers.found_inf;
      size_t first = 0;  // of the launch that is being packed
      const auto enqueue = [&, kernel = kernel] {
        check_launch(kernel->launch(packer, stream), names_[first], made++);
        packer.clear();
      };
      for (end = next; end < order_.size() && kernels_[order_[end]].second == kernel;) end++;
      launched.for_each(order_.begin() + next, order_.begin() + end, num_states, idle, zeros,
                        [&](const Tensor& t, size_t i) {
                          const float* own = numbers.coefficients ? nullptr : coefficients[t.coefficients];
                          if (!packer.add(t, own)) {
                            enqueue();
                            packer.add(t, own);
                          }
                          if (packer.num_tensors() == 1) first = i;
                        });
      if (!packer.empty()) enqueue();
    }
    return made;
  }

  // How many float64 numbers norm() needs.
  static int64_t num_squares(const std::vector<Tensor>& tensors) {
    int64_t chunks = 0;
    for (const Tensor& t : tensors) chunks += norm_chunks(t);
    return chunks;
  }

  // Enqueues the norm over all gradients. squares: num_squares() numbers on the device; grad_scale: there, or
  // null for 1.
  void norm(const LaunchedTensors& launched, cudaStream_t stream, double* squares, Norm* norm,
            double max_norm, const float* grad_scale) const {
    const DeviceGuard guard(device_);
    double* next = squares;
    for (int i = 0; i < TorchFormats::count; i++) {
      const Format format = Format(i);
      LaunchPacker packer(0, 0, norm_chunk, nullptr);
      size_t first = 0;
      const auto enqueue = [&] {
        if (packer.empty()) return;
        check_launch(launch_squares(format, packer, stream), names_[first], 0);
        packer.clear();
      };
      for (size_t i = 0; i < launched.tensors.size(); i++) {
        const Tensor& t = launched.tensors[i];
        if (t.coefficients < 0 || t.g.format != format) continue;
        Tensor with_sums = {};
        with_sums.p.data[0] = next;
        with_sums.g = t.g;
        with_sums.size = launched.gradient_size(i);
        if (with_sums.size == 0) continue;
        if (!packer.add(with_sums, nullptr)) {
          enqueue();
          packer.add(with_sums, nullptr);
        }
        if (packer.num_tensors() == 1) first = i;
        next += norm_chunks(with_sums);
      }
      enqueue();
    }
    check_launch(launch_norm(squares, next - squares, max_norm, grad_scale, norm, stream), names_[0], 0);
  }

 private:
  static int64_t norm_chunks(const Tensor& t) { return (t.size + norm_chunk - 1) / norm_chunk; }

  const int device_;
  std::vector<std::string> names_;
  std::vector<std::pair<const CudaRule*, const CudaKernel*>> kernels_;  // of each tensor
  std::vector<size_t> order_;  // tensors with elements, those of one kernel together
};

// What run() would launch for tensors of these sizes with these coefficients: (tensors, blocks) each.
inline std::vector<std::pair<int, int64_t>> launch_plan(const CudaRule& rule,
                                                        const std::vector<int64_t>& sizes,
                                                        const std::vector<int>& sets, bool on_device) {
  const std::vector<float> coefficients(rule.info.num_floats());
  LaunchPacker packer(rule.info.num_states, int(coefficients.size()), rule.chunk_size,
                      on_device ? coefficients.data() : nullptr);
  std::vector<std::pair<int, int64_t>> launches;
  for (size_t i = 0; i < sizes.size(); i++) {
    if (sizes[i] == 0) continue;
    Tensor t = {};
    t.size = sizes[i];
    t.coefficients = sets[i];
    if (packer.add(t, coefficients.data())) continue;
    launches.emplace_back(packer.num_tensors(), packer.num_blocks());
    packer.clear();
    packer.add(t, coefficients.data());
  }
  if (!packer.empty()) launches.emplace_back(packer.num_tensors(), packer.num_blocks());
  return launches;
}

}  // namespace danlu
