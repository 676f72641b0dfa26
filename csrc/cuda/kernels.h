// What the CUDA engine compiles of a rule: a launcher for each combination of storage formats that has one.
#pragma once
#include <vector>

#include "format_list.h"
#include "launch_list.h"
#include "runtime.h"

namespace danlu {

using Launcher = cudaError_t (*)(LaunchPacker&, cudaStream_t);

struct CudaKernel {
  FormatList formats;
  Launcher launch;
};

struct CudaRule {
  RuleInfo info;
  int chunk_size;
  std::vector<CudaKernel> kernels;
};

// generated, see cuda/rules.cpp.in
std::vector<CudaRule> cuda_rules();

}  // namespace danlu
