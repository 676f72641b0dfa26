// The last pass: new parameters and element-wise states.
#pragma once
#include "elements.cuh"

namespace danlu {
namespace DANLU_ISA {

template <class Rule, class F>
__global__ void __launch_bounds__(pass_threads, resident_blocks<Rule>)
    apply_kernel(const Pass __grid_constant__ pass) {
  WorkItem<Rule> item;
  if (!find_work_item(pass, item)) return;
  const Geometry t = *item.geometry;
  const int64_t from = int64_t(item.index) * pass_chunk;
  const Arrays<Rule, F> arrays = arrays_of<Rule, F>(pass, item.tensor, from);
  const bool store_params = item.coefficients.header.store_params != 0.f;
  typename Sums<Rule>::StepScales scales;
  if constexpr (Sums<Rule>::count > 0)
    scales = read_floats<typename Sums<Rule>::StepScales>(global(floats(pass, t.scales)));
  const Factors<Rule, Arrays<Rule, F>::width> factors(pass, t, from);
  const int size = int(smaller(t.size - from, int64_t(pass_chunk)));
  for_elements(arrays, factors, size, Reads(), [&](auto& e, int at) {
    e.update(item.coefficients, scales);
    e.store_all(arrays, at, store_params);
  });
}

}  // namespace DANLU_ISA
}  // namespace danlu
