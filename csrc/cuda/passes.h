// What the passes of rules that reduce share between host and device. Which blocks do what is said by
// python/danlu/schedule.py; the tables are in device memory.
#pragma once
#include <cstdint>
#include <vector>

#include "../common/tensor_list.h"
#include "runtime.h"

namespace danlu {

// One tensor; the fields are those of schedule.Geometry, which describes them.
#define GEOMETRY(...)    \
  struct Geometry {      \
    int64_t __VA_ARGS__; \
  };                     \
  constexpr const char* geometry_fields = #__VA_ARGS__
GEOMETRY(size, batch, rows, columns, lanes, warps, tile_rows, tile_columns, row_tiles, column_tiles, parts,
         row_sums, column_sums, part_sums, of_rows, of_columns, sums, factors);

// The arguments of one launch.
struct Pass {
  const int64_t* addresses;    // a row for each of parameter, gradient and states, then indices into rows
  const Geometry* geometries;  // of each tensor
  const int32_t *tensors, *indices;  // of each block; null where a block is a tensor
  const float* rows;                 // coefficient rows
  const float* clip;                 // or null; multiplies every gradient
  const float* found_inf;            // or null; where it is not 0 the launch does nothing
  double* scratch;
  int32_t num_tensors, row_stride;
  int32_t first_tensor;  // where a block is a tensor
  bool reverse;          // the last block first
  bool early;            // may start while the launch before it ends
  bool followed;         // by one that may
};

using PassLauncher = cudaError_t (*)(const Pass&, unsigned blocks, cudaStream_t);

enum PassKind {
  collect_pass,
  average_pass,
  spread_pass,
  measure_pass,
  settle_pass,
  step_pass,
  rows_pass,
  num_passes
};
constexpr const char* pass_names[num_passes] = {"collect", "average", "spread", "measure",
                                                "settle",  "step",    "rows"};

// The passes that one combination of storage formats has; null where the rule lacks one.
struct PassKernels {
  Dtype p, g, m;
  PassLauncher launch[num_passes];
};

struct ReducingRule {
  RuleInfo info;
  const char* along;  // as schedule.Reduction has it
  int num_sums;
  bool row_by_row;
  int first_moment;  // the state that is not always fp32; -1: none
  std::vector<PassKernels> kernels;
};

// generated, see cuda/rules.cpp.in
std::vector<ReducingRule> reducing_cuda_rules();

}  // namespace danlu
