// Tiger (Jianlin Su); the formula is in python/danlu/optimizers/tiger.py
#pragma once
#include "../common/rule.h"

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

// scale_parameter: eta is lr times the root mean square of a matrix
struct TigerMatrix {
  static constexpr int num_states = 1, num_sums = 1, first_moment = 0;
  COEFFS(keep, weight, lr, weight_decay);
  struct StepScales {
    float eta, decay;
  };

  static constexpr bool norms_need_p_alone = true;
  RULE_FN bool needs_norms(const Coeffs&) { return true; }

  RULE_FN void norm_terms(float p, float, float (&)[num_states], const Coeffs&, float (&terms)[num_sums]) {
    terms[0] = p * p;
  }

  RULE_FN StepScales finalize(const double (&sums)[num_sums], int64_t n, const Coeffs& k) {
    const float eta = k.lr * float(square_root(sums[0] / double(n)));
    return {eta, eta * k.weight_decay};
  }

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k, const StepScales& f) {
    float& m = s[0];
    m = k.keep * m + k.weight * g;
    return f.eta * sign(m) + f.decay * p;
  }
};

// ... or of each row of an embedding
struct TigerRows : TigerMatrix {
  static constexpr bool row_by_row = true;
};

}  // namespace DANLU_ISA
}  // namespace danlu
