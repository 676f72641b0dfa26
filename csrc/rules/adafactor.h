// Adafactor (arXiv:1804.04235); the formula and its presets are in python/danlu/optimizers/adafactor.py
#pragma once
#include "../common/rule.h"

namespace danlu {
namespace DANLU_ISA {

struct AdafactorCoeffs {
  COEFFS(beta2, weight2, eps1, floor, root_eps, clip, rho, eps2, scaled, late, beta1, weight1, decay,
         decay_alpha);
};

// a second moment after another square, or mean of squares; the largest finite number stands for larger ones
RULE_FN float adafactor_average(float v, float square, const AdafactorCoeffs::Coeffs& k) {
  return at_most_finite(k.beta2 * v + k.weight2 * (square + k.eps1));
}

// The second moment as a tensor.
struct FullVariance : AdafactorCoeffs {
  static constexpr int variance_states = 1;

  RULE_FN float direction(float g, float* s, const Coeffs& k) {
    s[0] = adafactor_average(s[0], g * g, k);
    return g / larger(square_root(s[0] + k.root_eps), k.floor);
  }
};

// The second moment as averages over the columns and over the rows of a matrix. What the passes over elements
// see in place of the two are their inverse roots: x of the element's row, y of its column.
struct FactoredAverages : AdafactorCoeffs {
  static constexpr int variance_states = 2;
  static constexpr Along statistics = Along::both;

  RULE_FN float statistic(float g, const Coeffs&) { return g * g; }

  RULE_FN void average(float& v, double mean, const Coeffs& k) {
    v = adafactor_average(v, at_most_finite(mean), k);
  }

  // A row of zeros beside gradients of 1e10: the quotient is below fp32's range, its inverse root is not.
  RULE_FN float row_factor(float r, double mean, const Coeffs& k) {
    return float(1 / square_root(double(r) / larger(mean, double(k.floor))));
  }

  RULE_FN float column_factor(float c, const Coeffs&) { return float(1 / square_root(double(c))); }
};

struct FactoredVariance : FactoredAverages {
  RULE_FN bool is_plain(const Coeffs& k) { return !(k.floor > 0.f); }
  RULE_FN Coeffs plain(Coeffs k) {
    k.floor = 0.f;
    return k;
  }

  RULE_FN float direction(float g, float* s, const Coeffs& k) {
    if (!(k.floor > 0.f)) return (g * s[0]) * s[1];
    const float most = 1.f / k.floor, both = s[0] * s[1];
    return g * (both > most ? most : both);  // NaN stays
  }
};

// eps once more, under the root
struct FactoredVarianceWithEps : FactoredAverages {
  RULE_FN float direction(float g, float* s, const Coeffs& k) {
    const float z = (square_root(k.root_eps) * s[0]) * s[1];
    return ((g * s[0]) * s[1]) / square_root(1.f + z * z);
  }
};

template <class Variance, bool has_momentum>
struct AdafactorOf : Variance {
  static constexpr int num_states = Variance::variance_states + has_momentum, num_sums = 2;
  static constexpr int first_moment = has_momentum ? num_states - 1 : -1;
  using Coeffs = typename Variance::Coeffs;
  struct StepScales {
    float inner, outer, decay;  // of the direction before and after the momentum, of p
  };

  RULE_FN bool needs_norms(const Coeffs& k) { return k.scaled != 0.f || k.clip < infinity; }
  // whether norm_terms() needs p; never the momentum
  RULE_FN bool norms_need_p(const Coeffs& k) { return k.scaled != 0.f; }

  RULE_FN void norm_terms(float p, float g, float (&s)[num_states], const Coeffs& k,
                          float (&terms)[num_sums]) {
    const float u = Variance::direction(g, s, k);
    terms[0] = p * p;
    terms[1] = u * u;
  }

  RULE_FN StepScales finalize(const double (&sums)[num_sums], int64_t n, const Coeffs& k) {
    const double clipped = 1 / larger(1.0, square_root(sums[1] / double(n)) / double(k.clip));
    double alpha = double(k.rho);
    if (k.scaled != 0.f) alpha *= larger(double(k.eps2), square_root(sums[0] / double(n)));
    const float decay = float(double(k.decay) + double(k.decay_alpha) * alpha);
    if (k.late != 0.f) return {float(clipped), float(alpha), decay};
    return {float(alpha * clipped), 1.f, decay};
  }

  RULE_FN float step(float p, float g, float (&s)[num_states], const Coeffs& k, const StepScales& f) {
    float u = f.inner * Variance::direction(g, s, k);
    if constexpr (has_momentum) {
      float& m = s[num_states - 1];
      m = k.beta1 * m + k.weight1 * u;
      u = m;
    }
    return f.outer * u + f.decay * p;
  }
};

using Adafactor = AdafactorOf<FullVariance, false>;
using AdafactorMomentum = AdafactorOf<FullVariance, true>;
using AdafactorFactored = AdafactorOf<FactoredVariance, false>;
using AdafactorFactoredMomentum = AdafactorOf<FactoredVariance, true>;
using AdafactorFactoredRoot = AdafactorOf<FactoredVarianceWithEps, false>;
using AdafactorFactoredRootMomentum = AdafactorOf<FactoredVarianceWithEps, true>;

}  // namespace DANLU_ISA
}  // namespace danlu
