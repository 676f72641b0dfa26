// The loop over one chunk of a tensor: loads, the rule, stores. Knows no optimizer.
#pragma once
#include "../common/rule_traits.h"
#include "kernel.h"
#include "storage.h"

namespace danlu {
namespace DANLU_ISA {

// The whole update of n fp32 elements, vectorised by the compiler. Arrays that the rule has no use for are
// null.
template <class Rule, bool StoreParams>
void step_block(float* __restrict p, const float* __restrict g, float* const (&states)[2], int64_t n,
                const float* coefficients) {
  constexpr Uses uses = UsesOf<Rule>::value;
  CoefficientsHeader header;
  typename Rule::Coeffs k;
  __builtin_memcpy(&header, coefficients, sizeof header);
  __builtin_memcpy(&k, coefficients + sizeof header / sizeof(float), sizeof k);
  float* __restrict first = states[0];
  float* __restrict second = states[1];
  for (int64_t i = 0; i < n; i++) {
    float s[Rule::num_states];
    s[0] = first[i];
    if constexpr (Rule::num_states > 1) s[1] = second[i];
    float old = 0.f, gradient = 0.f;
    if constexpr (uses.parameter) old = p[i];
    if constexpr (uses.gradient) gradient = header.factor * g[i];
    const float result = Rule::step(old, gradient, s, k);
    if constexpr (StoreParams) p[i] = outcome<Rule>(old, result);
    first[i] = s[0];
    if constexpr (Rule::num_states > 1) second[i] = s[1];
  }
}

template <class Rule>
void step_chunk(const Tensor& t, int64_t begin, int64_t end, const float* coefficients) {
  static_assert(Rule::num_states <= 2);
  constexpr Uses uses = UsesOf<Rule>::value;
  const bool store_params = uses.outcome != Outcome::none &&
                            reinterpret_cast<const CoefficientsHeader*>(coefficients)->store_params != 0.f;
  Lane p(t.p, t.first), g(t.g, t.first), first(t.states[0], t.first),
      second(t.states[Rule::num_states - 1], t.first);
  const bool direct =
      (!uses.parameter || p.direct()) && (!uses.gradient || g.direct()) && first.direct() && second.direct();
  const int64_t block = direct ? end - begin : Lane::buffer_size;
  for (int64_t at = begin; at < end; at += block) {
    const int64_t n = end - at < block ? end - at : block;
    float* const states[2] = {first.load(at, n), Rule::num_states > 1 ? second.load(at, n) : nullptr};
    float* const params = uses.parameter ? p.load(at, n) : nullptr;
    const float* const gradients = uses.gradient ? g.load(at, n) : nullptr;
    if (store_params) {
      step_block<Rule, true>(params, gradients, states, n, coefficients);
      p.store(at, n);
    } else {
      step_block<Rule, false>(params, gradients, states, n, coefficients);
    }
    first.store(at, n);
    if constexpr (Rule::num_states > 1) second.store(at, n);
  }
}

template <class Rule>
CpuRule describe(const char* name) {
  return {rule_info<Rule>(name), step_chunk<Rule>, {}};
}

}  // namespace DANLU_ISA
}  // namespace danlu
