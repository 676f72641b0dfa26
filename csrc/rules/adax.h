// AdaX and AdaXW (arXiv:2004.09740); the formulas are in python/danlu/optimizers/adax.py
#pragma once
#include "../common/rule.h"

namespace danlu {
namespace DANLU_ISA {

// m without bias correction, and v as the paper's divided by its normaliser
template <class Coeffs>
RULE_FN void adax_moments(float g, float (&s)[2], const Coeffs& k) {
  float &m = s[0], &v = s[1];
  // g * g alone would overflow where v does not; before m, since nvcc then keeps to its registers
  v = v + ((k.weight_t * g) * g - k.weight_t * v);
  m = k.beta1 * m + k.weight1 * g;
}

struct AdaXW {
  static constexpr int num_states = 2;
  COEFFS(beta1, weight1, weight_t, eps_t, lr, decay);  // decay = lr * weight_decay

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k) {
    adax_moments(g, s, k);
    return k.lr * (s[0] / (square_root(s[1]) + k.eps_t)) + k.decay * p;
  }
};

struct AdaX {
  static constexpr int num_states = 2;
  COEFFS(beta1, weight1, weight_t, eps_t, lr, weight_decay);

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k) {
    adax_moments(g + k.weight_decay * p, s, k);
    return k.lr * (s[0] / (square_root(s[1]) + k.eps_t));
  }
};

// eps_mode="inside": eps under the root
struct AdaXWInside {
  static constexpr int num_states = 2;
  COEFFS(beta1, weight1, weight_t, eps, lr, decay);

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k) {
    adax_moments(g, s, k);
    return k.lr * (s[0] / square_root(s[1] + k.eps)) + k.decay * p;
  }
};

struct AdaXInside {
  static constexpr int num_states = 2;
  COEFFS(beta1, weight1, weight_t, eps, lr, weight_decay);

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k) {
    adax_moments(g + k.weight_decay * p, s, k);
    return k.lr * (s[0] / square_root(s[1] + k.eps));
  }
};

}  // namespace DANLU_ISA
}  // namespace danlu
