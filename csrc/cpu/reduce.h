// The passes of rules that reduce, each over one tile of a tensor: a file each. Knows no optimizer.
//
// A rule may have statistics (statistic(), average...(): sums of its gradient along the rows or the columns
// of a matrix, from which its reduced states and what stands in their place for each row or column follow),
// and sums (needs_norms(), reduce_norms(), finalize(): over a whole tensor, or over each of its rows where
// the rule says row_by_row, from which the scales of its step follow). Sums of a tile are fp32 sums of up to
// 4,096 elements, each position of a block by itself; everything after that is float64, in a fixed order.
#pragma once
#include "reduce/apply.h"
#include "reduce/reduce_gradient.h"
#include "reduce/reduce_norms.h"
#include "reduce/update_factors.h"

namespace danlu {
namespace DANLU_ISA {

template <class Rule>
CpuRule describe_reducing(const char* name) {
  using Kinds = StateKinds<Rule>;
  constexpr Along along = Statistics<Rule>::along;
  static_assert(sizeof(typename Sums<Rule>::StepScales) <= Reducer::max_scales * sizeof(float));
  Reducer r = {};
  r.row_arrays = Kinds::of_rows;
  r.column_arrays = Kinds::of_columns;
  r.row_sums = along == Along::rows || along == Along::both;
  r.column_sums = along == Along::columns || along == Along::both;
  if constexpr (along != Along::none) {
    r.reduce_gradient = reduce_gradient<Rule>;
    r.sum_statistics = sum_statistics<Rule>;
    r.update_factors = update_factors<Rule>;
  }
  r.num_sums = Sums<Rule>::count;
  r.whole_rows = RowByRow<Rule>::value;
  r.apply = r.apply_reduced = apply<Rule, false>;
  if constexpr (RowByRow<Rule>::value) {
    r.reduce_row_norms = reduce_row_norms<Rule>;
    r.apply_reduced = apply<Rule, true>;
  } else if constexpr (Sums<Rule>::count > 0) {
    r.needs_norms = needs_norms<Rule>;
    r.reduce_norms = reduce_norms<Rule>;
    r.sum_tiles = sum_tiles<Rule>;
    r.finalize = finalize<Rule>;
  }
  return {rule_info<Rule>(name), nullptr, r};
}

}  // namespace DANLU_ISA
}  // namespace danlu
