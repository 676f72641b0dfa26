// The launches of tensors whose rule reduces.
#pragma once
#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"
#include "passes.h"

namespace danlu {

inline const ReducingRule* find_reducing_rule(const std::string& name) {
  static const std::vector<ReducingRule> rules = reducing_cuda_rules();
  for (const ReducingRule& rule : rules)
    if (name == rule.info.name) return &rule;
  return nullptr;
}

// All passes over tensors of one rule and one combination of formats, in the order in which they were added.
class PassList {
 public:
  // name: of the first parameter; geometries, scratch: addresses on the device
  PassList(const std::string& rule, const std::vector<std::string>& formats, const std::string& name,
           int device, int num_tensors, uintptr_t geometries, uintptr_t scratch)
      : name_(name), device_(std::max(device, 0)) {
    const ReducingRule* found = find_reducing_rule(rule);
    kernels_ = found ? find_kernel(found->kernels, formats) : nullptr;
    if (!kernels_) throw std::invalid_argument("no CUDA kernels of " + rule + " for these formats");
    pass_.geometries = reinterpret_cast<const Geometry*>(geometries);
    pass_.scratch = reinterpret_cast<double*>(scratch);
    pass_.num_tensors = num_tensors;
  }

  // tensors, indices: addresses of a map's halves on the device, or 0 where a block is a tensor
  void add(const std::string& kernel, int64_t first, int64_t count, bool reverse, uintptr_t tensors,
           uintptr_t indices) {
    const auto name = std::find(std::begin(pass_names), std::end(pass_names), kernel);
    if (name == std::end(pass_names)) throw std::invalid_argument("no pass " + kernel);
    const PassLauncher launch = kernels_->launch[name - std::begin(pass_names)];
    if (!launch) throw std::invalid_argument("the rule has no pass " + kernel);
    Pass pass = pass_;
    pass.reverse = reverse;
    pass.first_tensor = int(first);
    if (tensors) {
      pass.tensors = reinterpret_cast<const int32_t*>(tensors) + first;
      pass.indices = reinterpret_cast<const int32_t*>(indices) + first;
    }
    launches_.push_back({launch, pass, unsigned(count)});
  }

  // Enqueues them on a stream and returns their number, with the `made` of this step before. addresses,
  // coefficients: tables on the device; clip, found_inf: addresses of fp32 numbers on the device, or 0.
  int run(uintptr_t stream, uintptr_t addresses, uintptr_t coefficients, int stride, uintptr_t clip,
          uintptr_t found_inf, int made) {
    const DeviceGuard guard(device_);
    for (size_t i = 0; i < launches_.size(); i++) {
      Launch& launch = launches_[i];
      launch.pass.early = dependent && i > 0;
      launch.pass.followed = dependent && i + 1 < launches_.size();
      launch.pass.addresses = reinterpret_cast<const int64_t*>(addresses);
      launch.pass.coefficients = reinterpret_cast<const float*>(coefficients);
      launch.pass.stride = stride;
      launch.pass.clip = reinterpret_cast<const float*>(clip);
      launch.pass.found_inf = reinterpret_cast<const float*>(found_inf);
      check_launch(launch.kernel(launch.pass, launch.blocks, reinterpret_cast<cudaStream_t>(stream)), name_,
                   made++);
    }
    return made;
  }

  // Whether passes may start early; only where their code waits, see dependent.cuh.
  bool dependent = false;

 private:
  struct Launch {
    PassLauncher kernel;
    Pass pass;
    unsigned blocks;
  };

  const std::string name_;
  const int device_;
  const PassKernels* kernels_;
  Pass pass_ = {};
  std::vector<Launch> launches_;
};

}  // namespace danlu
