// What the engines ask of a rule.
#pragma once
#include "rule.h"

namespace danlu {
namespace DANLU_ISA {

// What a rule says of itself, with defaults for what it does not mention.
template <class Rule, class = void>
struct UsesOf {
  static constexpr Uses value = {true, true, Outcome::subtracted};
};
template <class Rule>
struct UsesOf<Rule, decltype(void(Rule::uses))> {
  static constexpr Uses value = Rule::uses;
};

// The parameter after a step, from what it was and what step() returned.
template <class Rule>
RULE_FN float outcome(float p, float result) {
  return UsesOf<Rule>::value.outcome == Outcome::assigned ? result : p - result;
}

template <class Rule, class = void>
struct Statistics {
  static constexpr Along along = Along::none;
};
template <class Rule>
struct Statistics<Rule, decltype(void(Rule::statistics))> {
  static constexpr Along along = Rule::statistics;
};

struct NoScales {};
template <class Rule, class = void>
struct Sums {
  static constexpr int count = 0;
  using StepScales = NoScales;
};
template <class Rule>
struct Sums<Rule, decltype(void(Rule::num_sums))> {
  static constexpr int count = Rule::num_sums;
  using StepScales = typename Rule::StepScales;
};

template <class Rule, class = void>
struct RowByRow {
  static constexpr bool value = false;
};
template <class Rule>
struct RowByRow<Rule, decltype(void(Rule::row_by_row))> {
  static constexpr bool value = true;
};

// Calls body(coefficients). A rule may have a plain case, whose coefficients are then known to be that: what
// depends on coefficients alone is asked once for many elements.
template <class Rule, class = void>
struct Cases {
  template <class Body>
  RULE_FN void call(const typename Rule::Coeffs& k, const Body& body) {
    body(k);
  }
};
template <class Rule>
struct Cases<Rule, decltype(void(&Rule::is_plain))> {
  template <class Body>
  RULE_FN void call(const typename Rule::Coeffs& k, const Body& body) {
    if (Rule::is_plain(k))
      body(Rule::plain(k));
    else
      body(k);
  }
};

// Where the states of a rule come from: constants of a row, arrays over columns, arrays over elements.
template <class Rule>
struct StateKinds {
  static constexpr Along along = Statistics<Rule>::along;
  static constexpr int of_rows = along == Along::rows ? 2 : along == Along::both ? 1 : 0;
  static constexpr int of_columns = along == Along::columns ? 2 : along == Along::both ? 1 : 0;
  static constexpr int elementwise = Rule::num_states - of_rows - of_columns;
  static_assert(elementwise >= 0 && elementwise <= 3);
};

}  // namespace DANLU_ISA
}  // namespace danlu
