// What the passes of rules that reduce share between host and device. Which blocks do what is said by
// python/danlu/schedule.py; the tables are in device memory.
#pragma once
#include <cstdint>
#include <vector>

#include "format_list.h"
#include "runtime.h"

namespace danlu {

// One tensor; the fields are those of schedule.Geometry, which describes them.
#define GEOMETRY(...)    \
  struct Geometry {      \
    int64_t __VA_ARGS__; \
  };                     \
  constexpr const char* geometry_fields = #__VA_ARGS__
GEOMETRY(size, batch, rows, columns, lanes, warps, tile_rows, tile_columns, row_tiles, column_tiles, parts,
         row_sums, column_sums, part_sums, row_factors, column_factors, sums, scales, chunks, summed_rows,
         summed_columns, summed_size, matrix_sums, average_sums, row_norms, half);

// The arguments of one launch.
struct Pass {
  const int64_t* addresses;          // as AddressList::table() has them
  const Geometry* geometries;        // of each tensor
  const int32_t *tensors, *indices;  // of each block; null where a block is a tensor
  const float* coefficients;         // coefficients
  const float* clip;                 // or null; multiplies every gradient
  const float* found_inf;            // or null; where it is not 0 the launch does nothing
  double* scratch;
  int32_t num_tensors, stride;
  int32_t first_tensor;  // where a block is a tensor
  bool reverse;          // the last block first
  bool early;            // may start while the launch before it ends
  bool followed;         // by one that may
};

using PassLauncher = cudaError_t (*)(const Pass&, unsigned blocks, cudaStream_t);

enum PassKind {
  reduce_gradient_pass,
  update_factors_pass,
  update_row_factors_pass,
  reduce_norms_pass,
  finalize_pass,
  apply_pass,
  apply_by_row_pass,
  num_passes
};
constexpr const char* pass_names[num_passes] = {"reduce_gradient", "update_factors", "update_row_factors",
                                                "reduce_norms",    "finalize",       "apply",
                                                "apply_by_row"};

// The passes that one combination of storage formats has; null where the rule lacks one.
struct PassKernels {
  FormatList formats;
  PassLauncher launch[num_passes];
};

struct ReducingRule {
  RuleInfo info;
  const char* along;  // as schedule.Reduction has it
  int num_sums;
  bool row_by_row;
  std::vector<PassKernels> kernels;
};

// generated, see cuda/rules.cpp.in
std::vector<ReducingRule> reducing_cuda_rules();

}  // namespace danlu
