// Moving average of a parameter; the formula is in python/danlu/wrappers/ema.py
#pragma once
#include "../common/rule.h"

namespace danlu {
namespace DANLU_ISA {

struct Average {
  static constexpr int num_states = 1;
  static constexpr Uses uses = {true, false, Outcome::none};
  COEFFS(weight);

  RULE_FN float step(float p, float, float (&s)[num_states], const Coeffs& k) {
    s[0] = s[0] + k.weight * (p - s[0]);
    return 0.f;
  }
};

}  // namespace DANLU_ISA
}  // namespace danlu
