// Sums over a tensor, or over each of its rows, and the scales of its step that follow from them.
#pragma once
#include "blocks.h"
#include "sums.h"

namespace danlu {
namespace DANLU_ISA {

template <class Rule, bool narrow>
void reduce_norms_block(const Block& block, const Coefficients<Rule>& coefficients_,
                        float (*sums)[tiles::width]) {
  const Block b = block;
  const Coefficients<Rule> coefficients = coefficients_;
  float* first = sums[0];
  float* second = sums[Rule::num_sums - 1];
#pragma GCC ivdep
  for (int64_t i = 0; i < b.n; i++) {
    float s[Rule::num_states], terms[Rule::num_sums];
    load_states<Rule, narrow>(s, b, i);
    Rule::norm_terms(b.p[i], coefficients.header.factor * b.g[i], s, coefficients.k, terms);
    first[i] += terms[0];
    if constexpr (Rule::num_sums > 1) second[i] += terms[1];
  }
}

// Sums of terms, each position of a block by itself.
template <class Rule>
struct Accumulators {
  static constexpr int count = Sums<Rule>::count;
  alignas(64) float sums[count][tiles::width];
  const int64_t n;

  explicit Accumulators(const Tiling& t)
      : n(is_narrow(t) ? tiles::narrow_width : at_most(t.columns, tiles::width)) {
    for (int j = 0; j < count; j++)
      for (int64_t i = 0; i < n; i++) sums[j][i] = 0.f;
  }

  void total(double (&totals)[count]) const {
    for (int j = 0; j < count; j++) totals[j] = wide_sum(sums[j], n);
  }
};

template <class Rule>
bool needs_norms(const float* coefficients) {
  return Rule::needs_norms(Coefficients<Rule>(coefficients).k);
}

template <class Rule>
void reduce_norms(const Operands& w, int64_t index) {
  const Coefficients<Rule> coefficients(w.coefficients);
  const Tile tile = tile_at(w.tiling, index);
  Blocks<Rule> blocks(w, {false, false});
  Accumulators<Rule> sums(w.tiling);
  blocks.visit(tile, tile.row, tile.rows, [&](const Block& b, auto narrow) {
    reduce_norms_block<Rule, narrow.value>(b, coefficients, sums.sums);
  });
  double totals[Rule::num_sums];
  sums.total(totals);
  for (int j = 0; j < Rule::num_sums; j++) w.scratch.tile_sums[index * Rule::num_sums + j] = totals[j];
}

template <class Rule>
void sum_tiles(const Operands& w) {
  const Coefficients<Rule> coefficients(w.coefficients);
  const Tiling& t = w.tiling;
  double totals[Rule::num_sums] = {};
  if (Rule::needs_norms(coefficients.k))
    for (int64_t i = 0; i < count(t); i++)
      for (int j = 0; j < Rule::num_sums; j++) totals[j] += w.scratch.tile_sums[i * Rule::num_sums + j];
  for (int j = 0; j < Rule::num_sums; j++) w.scratch.of_tensor[j] = totals[j];
}

// The scales of a step that follow from sums over n elements.
template <class Rule>
typename Rule::StepScales finalized(const double* sums, int64_t n, const Coefficients<Rule>& coefficients) {
  double totals[Rule::num_sums];
  for (int j = 0; j < Rule::num_sums; j++) totals[j] = sums[j];
  return Rule::finalize(totals, n, coefficients.k);
}

template <class Rule>
void finalize(const Operands& w) {
  const auto scales = finalized<Rule>(w.scratch.of_tensor, w.counts.size, Coefficients<Rule>(w.coefficients));
  __builtin_memcpy(w.scratch.scales, &scales, sizeof scales);
}

// Sums over one row of a tile.
template <class Rule>
void reduce_row(Blocks<Rule>& blocks, const Operands& w, const Tile& tile, int64_t r,
                const Coefficients<Rule>& coefficients, double (&totals)[Rule::num_sums]) {
  Accumulators<Rule> sums(w.tiling);
  blocks.visit(tile, r, 1, [&](const Block& b, auto narrow) {
    reduce_norms_block<Rule, narrow.value>(b, coefficients, sums.sums);
  });
  sums.total(totals);
}

template <class Rule>
void reduce_row_norms(const Operands& w, int64_t index) {
  const Coefficients<Rule> coefficients(w.coefficients);
  const Tile tile = tile_at(w.tiling, index);
  Blocks<Rule> blocks(w, {false, false});
  for (int64_t r = tile.row; r < tile.row + tile.rows; r++) {
    double totals[Rule::num_sums];
    reduce_row(blocks, w, tile, r, coefficients, totals);
    const int64_t at = (tile.matrix * w.tiling.rows + r) * Rule::num_sums;
    for (int j = 0; j < Rule::num_sums; j++) w.scratch.of_tensor[at + j] = totals[j];
  }
}

}  // namespace DANLU_ISA
}  // namespace danlu
