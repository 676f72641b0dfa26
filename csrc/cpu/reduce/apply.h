// The step of a tile.
#pragma once
#include "blocks.h"
#include "reduce_norms.h"

namespace danlu {
namespace DANLU_ISA {

template <class Rule, bool narrow, bool store_params>
void apply_block(const Block& block, const Coefficients<Rule>& coefficients_,
                 const typename Sums<Rule>::StepScales& scales) {
  using Kinds = StateKinds<Rule>;
  const Block b = block;
  const Coefficients<Rule> coefficients = coefficients_;
  const typename Sums<Rule>::StepScales f = scales;
#pragma GCC ivdep
  for (int64_t i = 0; i < b.n; i++) {
    float s[Rule::num_states], amount;
    load_states<Rule, narrow>(s, b, i);
    const float p = b.p[i], g = coefficients.header.factor * b.g[i];
    if constexpr (Sums<Rule>::count > 0)
      amount = Rule::step(p, g, s, coefficients.k, f);
    else
      amount = Rule::step(p, g, s, coefficients.k);
    if constexpr (store_params) b.p[i] = p - amount;
#pragma GCC unroll 3
    for (int j = 0; j < Kinds::elementwise; j++) b.element[j][i] = s[Kinds::of_rows + Kinds::of_columns + j];
  }
}

// reduced: of a rule that takes each row by itself, the rows' sums are there.
template <class Rule, bool store_params>
void apply_tile(const Operands& w, const Tile& tile, const Coefficients<Rule>& coefficients, bool reduced) {
  typename Sums<Rule>::StepScales scales;
  Blocks<Rule> blocks(w, {true, store_params});
  const auto update = [&](const Block& b, auto narrow) {
    apply_block<Rule, narrow.value, store_params>(b, coefficients, scales);
  };
  if constexpr (RowByRow<Rule>::value) {
    Blocks<Rule> unchanged(w, {false, false});
    for (int64_t r = tile.row; r < tile.row + tile.rows; r++) {
      double totals[Rule::num_sums];
      const double* sums = totals;
      if (reduced)
        sums = w.scratch.of_tensor + (tile.matrix * w.tiling.rows + r) * Rule::num_sums;
      else
        reduce_row(unchanged, w, tile, r, coefficients, totals);
      scales = finalized<Rule>(sums, w.counts.columns, coefficients);
      blocks.visit(tile, r, 1, update);
    }
  } else {
    if constexpr (Sums<Rule>::count > 0) __builtin_memcpy(&scales, w.scratch.scales, sizeof scales);
    blocks.visit(tile, tile.row, tile.rows, update);
  }
}

template <class Rule, bool reduced>
void apply(const Operands& w, int64_t index) {
  const Coefficients<Rule> coefficients(w.coefficients);
  const Tile tile = tile_at(w.tiling, index);
  if (coefficients.header.store_params != 0.f)
    apply_tile<Rule, true>(w, tile, coefficients, reduced);
  else
    apply_tile<Rule, false>(w, tile, coefficients, reduced);
}

}  // namespace DANLU_ISA
}  // namespace danlu
