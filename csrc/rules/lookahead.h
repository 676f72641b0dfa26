// Slow weights (arXiv:1907.08610); the formula is in python/danlu/wrappers/lookahead.py
#pragma once
#include "../common/rule.h"

namespace danlu {
namespace DANLU_ISA {

struct Lookahead {
  static constexpr int num_states = 1;
  static constexpr Uses uses = {true, false, Outcome::assigned};
  COEFFS(alpha);

  RULE_FN float step(float p, float, float (&s)[num_states], const Coeffs& k) {
    float& slow = s[0];
    slow = slow + k.alpha * (p - slow);
    return slow;
  }
};

}  // namespace DANLU_ISA
}  // namespace danlu
