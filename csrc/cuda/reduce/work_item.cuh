// What a block of a pass works on, and where that is in memory.
#pragma once
#include "../../common/rule_traits.h"
#include "../coefficients.cuh"
#include "../dependent.cuh"
#include "../passes.h"
#include "../storage.cuh"
#include "../sums.cuh"

namespace danlu {
namespace DANLU_ISA {

constexpr int pass_threads = 256, pass_warps = pass_threads / warp_size;
constexpr int pass_chunk = 16384;  // elements of a block in a pass over elements

// What a block works on.
template <class Rule>
struct WorkItem {
  int tensor, index;
  const Geometry* geometry;
  Coefficients<Rule> coefficients;
};

// In the table of addresses, behind those of parameter, gradient and states.
template <class Rule>
constexpr int row_of_coefficients = 2 + Rule::num_states;

// The index of the block's coefficients; negative if it has nothing to do. Reads only what is there before
// the first pass.
template <class Rule>
__device__ __forceinline__ int64_t look_up(const Pass& pass, WorkItem<Rule>& item) {
  if (pass.found_inf && *pass.found_inf != 0.f) return -1;
  const int block = int(pass.reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  item.tensor = pass.tensors ? pass.tensors[block] : pass.first_tensor + block;
  item.index = pass.tensors ? pass.indices[block] : 0;
  item.geometry = pass.geometries + item.tensor;
  return pass.addresses[int64_t(row_of_coefficients<Rule>) * pass.num_tensors + item.tensor];
}

// What every pass begins with: false if the block has nothing to do; it waits all the same. Coefficients that
// are read before the wait would stay in registers across it, and some kernels have none to spare.
template <class Rule>
__device__ __forceinline__ bool find_work_item(const Pass& pass, WorkItem<Rule>& item) {
  const int64_t index = look_up(pass, item);
  wait_for_pass_before();
  if (pass.followed) let_next_pass_start();
  if (index < 0) return false;
  item.coefficients = coefficients_at<Rule>(pass.coefficients + index * pass.stride, pass.clip);
  return true;
}

template <class T>
__device__ __forceinline__ T* array(const Pass& pass, int which, int tensor) {
  return global(reinterpret_cast<T*>(pass.addresses[int64_t(which) * pass.num_tensors + tensor]));
}

template <class Rule>
__device__ __forceinline__ float* reduced_state(const Pass& pass, const WorkItem<Rule>& item, int which) {
  return array<float>(pass, 2 + which, item.tensor);
}

__device__ __forceinline__ double* doubles(const Pass& pass, int64_t place) { return pass.scratch + place; }
__device__ __forceinline__ float* floats(const Pass& pass, int64_t place) {
  return reinterpret_cast<float*>(pass.scratch + place);
}

}  // namespace DANLU_ISA
}  // namespace danlu
