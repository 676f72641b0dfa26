// Lion (arXiv:2302.06675); the formula is in python/danlu/optimizers/lion.py
#pragma once
#include "../common/rule.h"

namespace danlu {
namespace DANLU_ISA {

struct Lion {
  static constexpr int num_states = 1;
  COEFFS(beta1, weight1, beta2, weight2, lr, decay);  // decay = lr * weight_decay

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k) {
    float& m = s[0];
    const float c = k.beta1 * m + k.weight1 * g;
    m = k.beta2 * m + k.weight2 * g;
    return k.lr * sign(c) + k.decay * p;
  }
};

}  // namespace DANLU_ISA
}  // namespace danlu
