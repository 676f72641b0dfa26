// Amos (arXiv:2210.11693); the formula is in python/danlu/optimizers/amos.py
#pragma once
#include "../common/rule.h"

namespace danlu {
namespace DANLU_ISA {

struct AmosBase {
  COEFFS(beta, weight, correction, xi_squared, c_rate, d_rate, scale, extra_l2, clip, momentum,
         momentum_weight);

  // NaN stays
  RULE_FN float clipped(float g, const Coeffs& k) {
    const float low = g < -k.clip ? -k.clip : g;
    return low > k.clip ? k.clip : low;
  }

  RULE_FN float statistic(float g, const Coeffs& k) {
    const float c = clipped(g, k);
    return c * c;
  }

  // Moves v and b, and says what multiplies p and g in a step.
  RULE_FN void average(float& v, float& b, float square, const Coeffs& k, float& of_p, float& of_g) {
    v = k.beta * v + k.weight * square;
    const float rv = k.correction / larger(v, 0x1p-125f);
    const float c = 1.f / square_root(1.f + k.c_rate * b);
    const float gamma = ((c * k.xi_squared) * rv) * square;
    const float d = 1.f / (1.f + k.d_rate * b);
    of_p = d * (gamma / 2.f + k.extra_l2);
    of_g = d * (k.scale * square_root(rv));
    b = b + gamma * (1.f + b);
  }
};

// One v and one b for each element.
struct AmosFull : AmosBase {
  RULE_FN float direction(float p, float g, float* s, const Coeffs& k) {
    float of_p, of_g;
    const float c = clipped(g, k);
    average(s[0], s[1], c * c, k, of_p, of_g);
    return of_p * p + of_g * c;
  }
};

// One v and one b for each row of a matrix, or for each column. What the pass over elements sees in their
// place is what multiplies p and g.
template <Along along>
struct AmosReduced : AmosBase {
  static constexpr Along statistics = along;

  RULE_FN void average_pair(float& v, float& b, double mean, const Coeffs& k, float& of_p, float& of_g) {
    average(v, b, at_most_finite(mean), k, of_p, of_g);
  }

  RULE_FN float direction(float p, float g, float* s, const Coeffs& k) {
    return s[0] * p + s[1] * clipped(g, k);
  }
};

template <class Variance, bool has_momentum>
struct AmosOf : Variance {
  static constexpr int num_states = 2 + has_momentum;
  static constexpr int first_moment = has_momentum ? num_states - 1 : -1;
  using Coeffs = typename Variance::Coeffs;

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k) {
    const float u = Variance::direction(p, g, s, k);
    if constexpr (!has_momentum) return u;
    float& m = s[num_states - 1];
    m = k.momentum * m + k.momentum_weight * u;
    return m;
  }
};

using AmosElementwise = AmosOf<AmosFull, false>;
using AmosElementwiseMomentum = AmosOf<AmosFull, true>;
using AmosRows = AmosOf<AmosReduced<Along::rows>, false>;
using AmosRowsMomentum = AmosOf<AmosReduced<Along::rows>, true>;
using AmosColumns = AmosOf<AmosReduced<Along::columns>, false>;
using AmosColumnsMomentum = AmosOf<AmosReduced<Along::columns>, true>;

}  // namespace DANLU_ISA
}  // namespace danlu
