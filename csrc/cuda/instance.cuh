// The list of storage formats that CUDA kernels are compiled for.
#pragma once
#include "engine.cuh"
#include "kernels.h"

namespace danlu {

template <class T>
constexpr Dtype dtype_of = std::is_same_v<T, float>  ? Dtype::f32
                           : std::is_same_v<T, bf16> ? Dtype::bf16
                                                     : Dtype::f16;

template <class Rule, class... F>
CudaRule cuda_rule_for(const char* name) {
  return {rule_info<Rule>(name),
          DefaultShape::chunk_size,
          {{dtype_of<typename F::P>, dtype_of<typename F::G>, dtype_of<typename F::M>, launch<Rule, F>}...}};
}

template <class Rule>
CudaRule cuda_rule(const char* name) {
  return cuda_rule_for<Rule,                          //
                       Formats<float, float, float>,  //
                       Formats<bf16, bf16, float>,    //
                       Formats<bf16, float, float>,   //
                       Formats<bf16, bf16, bf16>,     //
                       Formats<f16, f16, float>,      //
                       Formats<f16, float, float>,    //
                       Formats<float, bf16, float>,   //
                       Formats<float, float, bf16>>(name);
}

}  // namespace danlu
