// Layer adaptation, the mechanism of LAMB (arXiv:1904.00962), around an element-wise rule; the formula is in
// python/danlu/wrappers/layer_adaptation.py
#pragma once
#include "../common/rule.h"

namespace danlu {
namespace DANLU_ISA {

// The rule's names of coefficients, and group_lr.
template <class Rule>
struct LayerNames {
  static constexpr char last[] = ", group_lr";
  static constexpr int before = __builtin_strlen(Rule::coeff_names);
  char text[before + sizeof last] = {};

  constexpr LayerNames() {
    for (int i = 0; i < before; i++) text[i] = Rule::coeff_names[i];
    for (int i = 0; i < int(sizeof last); i++) text[before + i] = last[i];
  }
};

template <class Rule>
struct LayerAdapted {
  static constexpr int num_states = Rule::num_states, num_sums = 2, first_moment = 0;
  struct Coeffs : Rule::Coeffs {
    float group_lr;
  };
  static constexpr LayerNames<Rule> names = {};
  static constexpr const char* coeff_names = names.text;
  struct StepScales {
    float ratio;
  };

  RULE_FN bool needs_norms(const Coeffs&) { return true; }

  RULE_FN void norm_terms(float p, float g, float (&s)[num_states], const Coeffs& k,
                          float (&terms)[num_sums]) {
    const float amount = Rule::step(p, g, s, k);
    terms[0] = p * p;
    terms[1] = amount * amount;
  }

  // lr may be 0, and the amount then is: the norms are tested before anything is divided
  RULE_FN StepScales finalize(const double (&sums)[num_sums], int64_t, const Coeffs& k) {
    if (!(sums[0] > 0 && sums[1] > 0)) return {1.f};
    return {float(square_root(sums[0]) * double(k.group_lr) / square_root(sums[1]))};
  }

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k, const StepScales& f) {
    return f.ratio * Rule::step(p, g, s, k);
  }
};

}  // namespace DANLU_ISA
}  // namespace danlu
