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
  if constexpr (Sums<Rule>::count > 0)
    factors = read_floats<typename Sums<Rule>::Factors>(global(floats(pass, t.factors)));
  const StandIns<Rule, Arrays<Rule, F>::width> stand_ins(pass, t, from);
  const int size = int(smaller(t.size - from, int64_t(pass_chunk)));
  for_elements(arrays, stand_ins, size, Reads(), [&](auto& e, int at) {
    e.update(job.row, factors);
    e.store_all(arrays, at, store_params);
  });
}

}  // namespace DANLU_ISA
}  // namespace danlu
