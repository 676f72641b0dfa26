// Rules that take each row of a matrix by itself.
#pragma once
#include "measure.cuh"

namespace danlu {
namespace DANLU_ISA {

// Measures, settles and updates a row; a warp for each, so that its second reading finds it in the cache.
template <class Rule, class F>
__global__ void __launch_bounds__(pass_threads) rows_kernel(const Pass __grid_constant__ pass) {
  constexpr int count = Sums<Rule>::count, width = Arrays<Rule, F>::width;
  Job<Rule> job;
  if (!find_job(pass, job)) return;
  const Geometry t = *job.geometry;
  const int64_t row = int64_t(job.index) * pass_warps + threadIdx.x / warp_size;
  if (row >= t.batch * t.rows) return;
  const int lane = threadIdx.x % warp_size;
  const Arrays<Rule, F> arrays(pass, job.tensor, row * t.columns);
  const bool store_params = job.row.header.store_params != 0.f;
  const int64_t vector_end = arrays.aligned() ? t.columns / width * width : 0;
  const auto for_row = [&](Reads reads, const auto& body) {
#pragma unroll 1
    for (int64_t at = lane * width; at < vector_end; at += warp_size * width) {
      Elements<Rule, width> e;
      e.load_all(arrays, at, reads);
      body(e, at);
    }
#pragma unroll 1
    for (int64_t at = vector_end + lane; at < t.columns; at += warp_size) {
      Elements<Rule, 1> e;
      e.load_all(arrays, at, reads);
      body(e, at);
    }
  };
  double totals[count] = {};
  for_row(Measured<Rule>::reads(job.row.k), [&](const auto& e, int64_t) {
    float sums[count] = {};
    e.measure(job.row, sums);
#pragma unroll
    for (int j = 0; j < count; j++) totals[j] += double(sums[j]);
  });
#pragma unroll
  for (int j = 0; j < count; j++) totals[j] = warp_sum(totals[j]);
  const typename Rule::Factors factors = Rule::settle(totals, t.columns, job.row.k);
  for_row(Reads(), [&](auto& e, int64_t at) {
    e.update(job.row, factors);
    e.store_all(arrays, at, store_params);
  });
}

}  // namespace DANLU_ISA
}  // namespace danlu
