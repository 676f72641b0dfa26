// Sums of what a rule makes of its gradient, along the rows and columns of a tile.
#pragma once
#include "blocks.h"
#include "sums.h"

namespace danlu {
namespace DANLU_ISA {

template <class Rule>
void reduce_gradient_block(const float* __restrict g, int64_t n, const Coefficients<Rule>& coefficients_,
                           float* __restrict squares, float* __restrict column_sums) {
  const Coefficients<Rule> coefficients = coefficients_;
  for (int64_t i = 0; i < n; i++) {
    const float square = Rule::statistic(coefficients.header.factor * g[i], coefficients.k);
    if constexpr (Statistics<Rule>::along != Along::columns) squares[i] = square;
    if constexpr (Statistics<Rule>::along != Along::rows) column_sums[i] += square;
  }
}

template <class Rule>
void reduce_gradient(const Operands& w, int64_t index) {
  constexpr bool of_rows = Statistics<Rule>::along != Along::columns;
  constexpr bool of_columns = Statistics<Rule>::along != Along::rows;
  const Coefficients<Rule> coefficients(w.coefficients);
  const Tiling& t = w.tiling;
  const Tile tile = tile_at(t, index);
  Lane lane(w.tensor.g, w.tensor.first);
  alignas(64) float squares[tiles::width], columns_of_rows[tiles::narrow_width];
  // each of the narrow rows that make a block has sums of its own
  const int64_t height = is_narrow(t) ? at_most(tiles::narrow_width / t.columns, tile.rows) : 1;
  float *sums = nullptr, *columns = nullptr;
  if constexpr (of_columns) {
    sums = w.scratch.column_sums + (tile.matrix * t.row_tiles + tile.row_tile) * t.columns + tile.column;
    columns = height > 1 ? columns_of_rows : sums;
    for (int64_t c = 0; c < height * tile.columns; c++) columns[c] = 0.f;
  }
  for (int64_t r = tile.row; r < tile.row + tile.rows; r += height) {
    const int64_t rows = at_most(tile.row + tile.rows - r, height);
    const int64_t from = tile.matrix * t.rows + r;
    double* row_sums = w.scratch.row_sums + from * t.column_tiles + tile.column_tile;
    double sum = 0;
    for (int64_t c = 0; c < tile.columns; c += tiles::width) {
      const int64_t n = height > 1 ? rows * tile.columns : at_most(tile.columns - c, tiles::width);
      const int64_t at = from * t.columns + tile.column + c;
      if (w.fits_caches) ask_for(w.tensor.p, at, n);
      reduce_gradient_block<Rule>(lane.load(at, n), n, coefficients, squares, columns + c);
      if (of_rows && height == 1) sum += lane_sum(squares, n);
    }
    if (of_rows && height == 1) *row_sums = sum;
    if (of_rows && height > 1)
      for (int64_t k = 0; k < rows; k++)
        row_sums[k * t.column_tiles] = lane_sum(squares + k * t.columns, t.columns);
  }
  if (of_columns && height > 1) add_rows(columns, height, tile.columns, sums);
}

}  // namespace DANLU_ISA
}  // namespace danlu
