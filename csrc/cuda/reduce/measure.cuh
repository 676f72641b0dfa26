// Sums over whole tensors, and the factors of each tensor's step that follow from them.
#pragma once
#include "elements.cuh"

namespace danlu {
namespace DANLU_ISA {

constexpr int most_factors = 4;

// What measure() reads: everything, but for what a rule says.
template <class Rule, class = void>
struct Measured {
  static __device__ __forceinline__ Reads reads(const typename Rule::Coeffs&) { return {}; }
};
template <class Rule>
struct Measured<Rule, decltype(void(Rule::measures_p))> {
  static __device__ __forceinline__ Reads reads(const typename Rule::Coeffs& k) {
    return {Rule::measures_p(k), true, true, false};
  }
};
template <class Rule>
struct Measured<Rule, decltype(void(Rule::measures_p_alone))> {
  static __device__ __forceinline__ Reads reads(const typename Rule::Coeffs&) {
    return {true, false, false, false};
  }
};

template <class Rule, class F>
__global__ void __launch_bounds__(pass_threads, resident_blocks<Rule>)
    measure_kernel(const Pass __grid_constant__ pass) {
  constexpr int count = Sums<Rule>::count;
  Job<Rule> job;
  if (!find_job(pass, job) || !Rule::measures(job.row.k)) return;
  const Geometry t = *job.geometry;
  const int64_t from = int64_t(job.index) * pass_chunk;
  const Arrays<Rule, F> arrays(pass, job.tensor, from);
  float sums[count] = {};
  const StandIns<Rule, Arrays<Rule, F>::width> stand_ins(pass, t, from);
  const int size = int(smaller(t.size - from, int64_t(pass_chunk)));
  for_elements(arrays, stand_ins, size, Measured<Rule>::reads(job.row.k),
               [&](const auto& e, int) { e.measure(job.row, sums); });
  double totals[count];
#pragma unroll
  for (int j = 0; j < count; j++) totals[j] = sums[j];
  block_sums<pass_threads>(totals);
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int j = 0; j < count; j++) store(doubles(pass, t.sums) + int64_t(job.index) * count + j, totals[j]);
}

template <class Rule>
__global__ void __launch_bounds__(pass_threads) settle_kernel(const Pass __grid_constant__ pass) {
  constexpr int count = Sums<Rule>::count;
  Job<Rule> job;
  if (!find_job(pass, job)) return;
  const Geometry t = *job.geometry;
  double totals[count] = {};
  if (Rule::measures(job.row.k)) {
    const int64_t chunks = (t.size + pass_chunk - 1) / pass_chunk;
    for (int64_t i = threadIdx.x; i < chunks; i += pass_threads)
#pragma unroll
      for (int j = 0; j < count; j++) totals[j] += load(doubles(pass, t.sums) + i * count + j);
  }
  block_sums<pass_threads>(totals);
  if (threadIdx.x > 0) return;
  const typename Rule::Factors factors = Rule::settle(totals, t.size, job.row.k);
  static_assert(sizeof factors <= most_factors * sizeof(float));
  __builtin_memcpy(floats(pass, t.factors), &factors, sizeof factors);
}

}  // namespace DANLU_ISA
}  // namespace danlu
