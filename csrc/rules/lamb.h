// LAMB (arXiv:1904.00962); the formula is in python/danlu/optimizers/lamb.py
#pragma once
#include "adam.h"

namespace danlu {
namespace DANLU_ISA {

struct Lamb {
  static constexpr int num_states = 2, num_sums = 2, first_moment = 0;
  COEFFS(beta1, weight1, beta2, weight2, root2, eps, correction1, weight_decay, lr, adapt, max_ratio);
  struct StepScales {
    float lr;  // times the trust ratio
  };

  RULE_FN float update(float p, float g, float (&s)[num_states], const Coeffs& k) {
    return k.correction1 * adam_direction(g, s, k) + k.weight_decay * p;
  }

  RULE_FN bool needs_norms(const Coeffs& k) { return k.adapt != 0.f; }

  RULE_FN void norm_terms(float p, float g, float (&s)[num_states], const Coeffs& k,
                          float (&terms)[num_sums]) {
    const float u = update(p, g, s, k);
    terms[0] = p * p;
    terms[1] = u * u;
  }

  RULE_FN StepScales finalize(const double (&sums)[num_sums], int64_t, const Coeffs& k) {
    float ratio = 1.f;
    if (sums[0] > 0 && sums[1] > 0) ratio = float(square_root(sums[0]) / square_root(sums[1]));
    return {k.lr * (ratio > k.max_ratio ? k.max_ratio : ratio)};
  }

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k, const StepScales& f) {
    return f.lr * update(p, g, s, k);
  }
};

}  // namespace DANLU_ISA
}  // namespace danlu
