// One gradient of a mean; the formula is in python/danlu/wrappers/gradient_accumulation.py
#pragma once
#include "../common/rule.h"

namespace danlu {
namespace DANLU_ISA {

struct Accumulate {
  static constexpr int num_states = 1;
  static constexpr Uses uses = {false, true, Outcome::none};
  COEFFS(fresh, weight);

  RULE_FN float step(float, float g, float (&s)[num_states], const Coeffs& k) {
    const float term = k.weight * g;
    s[0] = k.fresh != 0.f ? term
                          : s[0] + term;  // what an earlier mean left is not even multiplied: it may be NaN
    return 0.f;
  }
};

}  // namespace DANLU_ISA
}  // namespace danlu
