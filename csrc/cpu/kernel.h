// What the CPU engine compiles of a rule for one instruction set.
#pragma once
#include "../tensor_list.h"

namespace danlu {

// Updates elements [begin, end) of a tensor with its coefficient row.
using Kernel = void (*)(const Tensor&, int64_t begin, int64_t end, const float* row);

struct CpuRule {
  RuleInfo info;
  Kernel kernel;
};

}  // namespace danlu
