// Rules that reduce, on a GPU: the kernels of their passes, for each combination of storage formats. Knows no
// optimizer. All sums are taken in an order that follows from the shapes: up to 512 elements in fp32,
// everything after that in float64.
#pragma once
#include "combinations.cuh"
#include "reduce/apply.cuh"
#include "reduce/apply_by_row.cuh"
#include "reduce/reduce_gradient.cuh"
#include "reduce/reduce_norms.cuh"
#include "reduce/update_factors.cuh"

namespace danlu {
namespace DANLU_ISA {

template <auto kernel>
cudaError_t enqueue(const Pass& pass, unsigned blocks, cudaStream_t stream) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(pass_threads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = pass.early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, pass);
}

template <class F, int value>
constexpr bool is_fp32 = std::is_same_v<typename F::template Value<value>, F32>;

template <class Rule, class F>
PassKernels pass_kernels() {
  constexpr Along along = Statistics<Rule>::along;
  PassKernels k = {formats_of(F()), {}};
  if constexpr (RowByRow<Rule>::value) {
    k.launch[apply_by_row_pass] = enqueue<apply_by_row_kernel<Rule, F>>;
  } else {
    if constexpr (along != Along::none) {
      static_assert(is_fp32<F, 2> && is_fp32<F, 3>, "what is averaged along rows and columns is fp32");
      k.launch[reduce_gradient_pass] =
          enqueue<reduce_gradient_kernel<Rule, Element<typename F::template Value<1>>>>;
      k.launch[update_factors_pass] = enqueue<update_factors_kernel<Rule>>;
    }
    if constexpr (along == Along::both)
      k.launch[update_row_factors_pass] = enqueue<update_row_factors_kernel<Rule>>;
    if constexpr (Sums<Rule>::count > 0) {
      k.launch[reduce_norms_pass] = enqueue<reduce_norms_kernel<Rule, F>>;
      k.launch[finalize_pass] = enqueue<finalize_kernel<Rule>>;
    }
    k.launch[apply_pass] = enqueue<apply_kernel<Rule, F>>;
  }
  return k;
}

template <class Rule>
ReducingRule describe_reducing(const char* name) {
  constexpr Along along = Statistics<Rule>::along;
  ReducingRule rule = {rule_info<Rule>(name),
                       along == Along::both      ? "both"
                       : along == Along::rows    ? "rows"
                       : along == Along::columns ? "columns"
                                                 : "none",
                       Sums<Rule>::count,
                       RowByRow<Rule>::value,
                       {}};
  for_each_combination<Rule, F32>(
      [&](auto formats) { rule.kernels.push_back(pass_kernels<Rule, typename decltype(formats)::type>()); });
  return rule;
}

}  // namespace DANLU_ISA
}  // namespace danlu
