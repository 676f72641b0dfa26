// Sums over whole tensors, and the scales of each tensor's step that follow from them.
#pragma once
#include "elements.cuh"

namespace danlu {
namespace DANLU_ISA {

constexpr int most_scales = 4;

// What norm_terms() reads: everything, but for what a rule says.
template <class Rule, class = void>
struct NormReads {
  static __device__ __forceinline__ Reads reads(const typename Rule::Coeffs&) { return {}; }
};
template <class Rule>
struct NormReads<Rule, decltype(void(Rule::norms_need_p))> {
  static __device__ __forceinline__ Reads reads(const typename Rule::Coeffs& k) {
    return {Rule::norms_need_p(k), true, true, false};
  }
};
template <class Rule>
struct NormReads<Rule, decltype(void(Rule::norms_need_p_alone))> {
  static __device__ __forceinline__ Reads reads(const typename Rule::Coeffs&) {
    return {true, false, false, false};
  }
};

template <class Rule, class F>
__global__ void __launch_bounds__(pass_threads, resident_blocks<Rule>)
    reduce_norms_kernel(const Pass __grid_constant__ pass) {
  constexpr int count = Sums<Rule>::count;
  WorkItem<Rule> item;
  if (!find_work_item(pass, item) || !Rule::needs_norms(item.coefficients.k)) return;
  const Geometry t = *item.geometry;
  const int64_t from = int64_t(item.index) * pass_chunk;
  const Arrays<Rule, F> arrays = arrays_of<Rule, F>(pass, item.tensor, from);
  float sums[count] = {};
  const Factors<Rule, Arrays<Rule, F>::width> factors(pass, t, from);
  const int size = int(smaller(t.size - from, int64_t(pass_chunk)));
  for_elements(arrays, factors, size, NormReads<Rule>::reads(item.coefficients.k),
               [&](const auto& e, int) { e.add_norms(item.coefficients, sums); });
  double totals[count];
#pragma unroll
  for (int j = 0; j < count; j++) totals[j] = sums[j];
  block_sums<pass_threads>(totals);
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int j = 0; j < count; j++) store(doubles(pass, t.sums) + int64_t(item.index) * count + j, totals[j]);
}

template <class Rule>
__global__ void __launch_bounds__(pass_threads) finalize_kernel(const Pass __grid_constant__ pass) {
  constexpr int count = Sums<Rule>::count;
  WorkItem<Rule> item;
  if (!find_work_item(pass, item)) return;
  const Geometry t = *item.geometry;
  double totals[count] = {};
  if (Rule::needs_norms(item.coefficients.k)) {
    for (int64_t i = threadIdx.x; i < t.chunks; i += pass_threads)
#pragma unroll
      for (int j = 0; j < count; j++) totals[j] += load(doubles(pass, t.sums) + i * count + j);
  }
  block_sums<pass_threads>(totals);
  if (threadIdx.x > 0) return;
  const typename Rule::StepScales scales = Rule::finalize(totals, t.summed_size, item.coefficients.k);
  static_assert(sizeof scales <= most_scales * sizeof(float));
  __builtin_memcpy(floats(pass, t.scales), &scales, sizeof scales);
}

}  // namespace DANLU_ISA
}  // namespace danlu
