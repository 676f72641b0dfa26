// Tiger (Jianlin Su); the formula is in python/danlu/optimizers/tiger.py
#pragma once
#include "../rule.h"

namespace danlu {
namespace DANLU_ISA {

struct Tiger {
  static constexpr int num_states = 1;
  COEFFS(keep, weight, eta, decay);  // keep is beta, or 1 inside an accumulation cycle

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k) {
    float& m = s[0];
    m = k.keep * m + k.weight * g;
    return k.eta * sign(m) + k.decay * p;
  }
};

}  // namespace DANLU_ISA
}  // namespace danlu
