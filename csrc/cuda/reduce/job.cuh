// What a block of a pass works on, and where that is in memory.
#pragma once
#include "../../common/rule_traits.h"
#include "../dependent.cuh"
#include "../formats.cuh"
#include "../passes.h"
#include "../sums.cuh"

namespace danlu {
namespace DANLU_ISA {

constexpr int pass_threads = 256, pass_warps = pass_threads / warp_size;
constexpr int pass_chunk = 16384;  // elements of a block in a pass over elements

// What a block works on.
template <class Rule>
struct Job {
  int tensor, index;
  const Geometry* geometry;
  Row<Rule> row;
};

// The block's coefficient row; negative if it has nothing to do. Reads only what is there before the first
// pass.
template <class Rule>
__device__ __forceinline__ int64_t look_up(const Pass& pass, Job<Rule>& job) {
  if (pass.found_inf && *pass.found_inf != 0.f) return -1;
  const int block = int(pass.reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  job.tensor = pass.tensors ? pass.tensors[block] : pass.first_tensor + block;
  job.index = pass.tensors ? pass.indices[block] : 0;
  job.geometry = pass.geometries + job.tensor;
  return pass.addresses[int64_t(2 + Rule::num_states) * pass.num_tensors + job.tensor];
}

// What every pass begins with: false if the block has nothing to do; it waits all the same. Coefficients that
// are read before the wait would stay in registers across it, and some kernels have none to spare.
template <class Rule>
__device__ __forceinline__ bool find_job(const Pass& pass, Job<Rule>& job) {
  const int64_t row = look_up(pass, job);
  wait_for_pass_before();
  if (pass.followed) let_next_pass_start();
  if (row < 0) return false;
  job.row = row_at<Rule>(pass.rows + row * pass.row_stride, pass.clip);
  return true;
}

template <class T>
__device__ __forceinline__ T* array(const Pass& pass, int which, int tensor) {
  return global(reinterpret_cast<T*>(pass.addresses[int64_t(which) * pass.num_tensors + tensor]));
}

template <class Rule>
__device__ __forceinline__ float* reduced_state(const Pass& pass, const Job<Rule>& job, int which) {
  return array<float>(pass, 2 + which, job.tensor);
}

__device__ __forceinline__ double* doubles(const Pass& pass, int64_t place) { return pass.scratch + place; }
__device__ __forceinline__ float* floats(const Pass& pass, int64_t place) {
  return reinterpret_cast<float*>(pass.scratch + place);
}

}  // namespace DANLU_ISA
}  // namespace danlu
