// The last pass: new parameters and element-wise states.
#pragma once
#include "elements.cuh"

namespace danlu {
namespace DANLU_ISA {

template <class Rule, class F>
__global__ void __launch_bounds__(pass_threads, resident_blocks<Rule>)
    step_kernel(const Pass __grid_constant__ pass) {
  Job<Rule> job;
  if (!find_job(pass, job)) return;
  const Geometry t = *job.geometry;
  const int64_t from = int64_t(job.index) * pass_chunk;
  const Arrays<Rule, F> arrays(pass, job.tensor, from);
  const bool store_params = job.row.header.store_params != 0.f;
  typename Sums<Rule>::Factors factors;
  if constexpr (Sums<Rule>::count > 0) __builtin_memcpy(&factors, floats(pass, t.factors), sizeof factors);
  for_elements<Rule, F>(arrays, StandIns<Rule>(pass, t, from),
                        int(smaller(t.size - from, int64_t(pass_chunk))), Reads(),
                        [&](auto& e, int at, auto width) {
#pragma unroll
                          for (int i = 0; i < decltype(width)::value; i++) e.update(i, job.row, factors);
                          e.store_all(arrays, at, store_params);
                        });
}

}  // namespace DANLU_ISA
}  // namespace danlu
