// Adam (arXiv:1412.6980) and AdamW (arXiv:1711.05101); the formulas are in python/danlu/optimizers/adam.py
#pragma once
#include "../common/rule.h"

namespace danlu {
namespace DANLU_ISA {

// m / d with the bias correction of v inside d; that of m is folded into lr1
template <class Coeffs>
RULE_FN float adam_direction(float g, float (&s)[2], const Coeffs& k) {
  float &m = s[0], &v = s[1];
  m = k.beta1 * m + k.weight1 * g;
  v = k.beta2 * v + (k.weight2 * g) * g;  // g * g alone would overflow where v does not
  const float d = square_root(v) * k.root2 + k.eps;
  return m / d;
}

struct AdamW {
  static constexpr int num_states = 2;
  COEFFS(beta1, weight1, beta2, weight2, lr1, root2, eps, decay);  // decay = lr * weight_decay

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k) {
    return k.lr1 * adam_direction(g, s, k) + k.decay * p;
  }
};

struct Adam {
  static constexpr int num_states = 2;
  COEFFS(beta1, weight1, beta2, weight2, lr1, root2, eps, weight_decay);

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k) {
    g = g + k.weight_decay * p;
    return k.lr1 * adam_direction(g, s, k);
  }
};

}  // namespace DANLU_ISA
}  // namespace danlu
