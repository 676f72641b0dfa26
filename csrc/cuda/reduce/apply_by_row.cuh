// Rules that take each row of a matrix by itself.
#pragma once
#include "reduce_norms.cuh"

namespace danlu {
namespace DANLU_ISA {

// All three passes of a row: a warp for each, so that its second reading finds it in the cache. Where a step
// stops in between, two launches have a half each.
template <class Rule, class F>
__global__ void __launch_bounds__(pass_threads) apply_by_row_kernel(const Pass __grid_constant__ pass) {
  constexpr int count = Sums<Rule>::count, width = Arrays<Rule, F>::width;
  WorkItem<Rule> item;
  if (!find_work_item(pass, item)) return;
  const Geometry t = *item.geometry;
  const int64_t row = int64_t(item.index) * pass_warps + threadIdx.x / warp_size;
  if (row >= t.batch * t.rows) return;
  const int lane = threadIdx.x % warp_size;
  const Arrays<Rule, F> arrays = arrays_of<Rule, F>(pass, item.tensor, row * t.columns);
  const bool store_params = item.coefficients.header.store_params != 0.f;
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
  double* const norms = doubles(pass, t.row_norms) + row * count;
  if (t.half != 2) {
    for_row(NormReads<Rule>::reads(item.coefficients.k), [&](const auto& e, int64_t) {
      float sums[count] = {};
      e.add_norms(item.coefficients, sums);
#pragma unroll
      for (int j = 0; j < count; j++) totals[j] += double(sums[j]);
    });
#pragma unroll
    for (int j = 0; j < count; j++) totals[j] = warp_sum(totals[j]);
  }
  if (t.half == 1) {
#pragma unroll
    for (int j = 0; j < count; j++)
      if (lane == 0) store(norms + j, totals[j]);
    return;
  }
  if (t.half == 2)
#pragma unroll
    for (int j = 0; j < count; j++) totals[j] = load(norms + j);
  const typename Rule::StepScales scales = Rule::finalize(totals, t.summed_columns, item.coefficients.k);
  for_row(Reads(), [&](auto& e, int64_t at) {
    e.update(item.coefficients, scales);
    e.store_all(arrays, at, store_params);
  });
}

}  // namespace DANLU_ISA
}  // namespace danlu
