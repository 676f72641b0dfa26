// The combinations of storage formats that kernels are compiled for.
#pragma once
#include "../common/formats.h"
#include "elements.cuh"

namespace danlu {
namespace DANLU_ISA {

// Formats of a parameter, its gradient and the first moment of a rule; other states are fp32.
template <class Rule, class P, class G, class M, int... state>
Formats<P, G, std::conditional_t<state == FirstMoment<Rule>::state, M, F32>...> with_moment(
    std::integer_sequence<int, state...>);

template <class Rule, class P, class G, class M>
using WithMoment = decltype(with_moment<Rule, P, G, M>(std::make_integer_sequence<int, Rule::num_states>()));

template <class Body, class... F>
void for_each_type(Types<F...>, const Body& body) {
  (body(Tag<F>()), ...);
}

// Calls body(Tag<Formats<...>>()). For tests -DDANLU_FEW_COMBINATIONS leaves two of them: all fp32, and bf16
// with FewMoment.
template <class Rule, class FewMoment, class Body>
void for_each_combination(const Body& body) {
#if defined(DANLU_FEW_COMBINATIONS)
  for_each_type(Types<WithMoment<Rule, F32, F32, F32>, WithMoment<Rule, Bf16, Bf16, FewMoment>>(), body);
#else
  for_each_type(Types<WithMoment<Rule, F32, F32, F32>,    //
                      WithMoment<Rule, Bf16, Bf16, F32>,  //
                      WithMoment<Rule, Bf16, F32, F32>,   //
                      WithMoment<Rule, F16, F16, F32>,    //
                      WithMoment<Rule, F16, F32, F32>,    //
                      WithMoment<Rule, F32, Bf16, F32>>(),
                body);
  if constexpr (FirstMoment<Rule>::state >= 0)
    for_each_type(Types<WithMoment<Rule, Bf16, Bf16, Bf16>, WithMoment<Rule, F32, F32, Bf16>>(), body);
#endif
  for_each_type(MoreCombinations(), [&](auto formats) {
    if constexpr (decltype(formats)::type::num_states == Rule::num_states) body(formats);
  });
}

}  // namespace DANLU_ISA
}  // namespace danlu
