// Moving averages of rows and columns, and what stands in their place in a step.
#pragma once
#include "blocks.h"
#include "sums.h"

namespace danlu {
namespace DANLU_ISA {

// Adds up what the tiles have left of each row.
static inline void sum_row_tiles(const Operands& w) {
  const Tiling& t = w.tiling;
  for (int64_t r = 0; r < t.batch * t.rows; r += tiles::width) {
    const int64_t n = at_most(t.batch * t.rows - r, tiles::width);
    const double* sums = w.scratch.row_sums + r * t.column_tiles;
    double* totals = w.scratch.of_rows + r;
    for (int64_t i = 0; i < n; i++) totals[i] = t.column_tiles > 0 ? sums[i * t.column_tiles] : 0;
    for (int64_t tile = 1; tile < t.column_tiles; tile++)
      for (int64_t i = 0; i < n; i++) totals[i] += sums[i * t.column_tiles + tile];
  }
}

// ... and of each column.
static inline void sum_column_tiles(const Operands& w) {
  const Tiling& t = w.tiling;
  for (int64_t matrix = 0; matrix < t.batch; matrix++)
    for (int64_t c = 0; c < t.columns; c += tiles::width) {
      const int64_t n = at_most(t.columns - c, tiles::width);
      double* totals = w.scratch.of_columns + matrix * t.columns + c;
      for (int64_t i = 0; i < n; i++) totals[i] = 0;
      for (int64_t tile = 0; tile < t.row_tiles; tile++) {
        const float* sums = w.scratch.column_sums + (matrix * t.row_tiles + tile) * t.columns + c;
        for (int64_t i = 0; i < n; i++) totals[i] += double(sums[i]);
      }
    }
}

template <class Rule>
void sum_statistics(const Operands& w) {
  const Tiling& t = w.tiling;
  const Scratch& s = w.scratch;
  if constexpr (Statistics<Rule>::along != Along::columns) sum_row_tiles(w);
  if constexpr (Statistics<Rule>::along != Along::rows) sum_column_tiles(w);
  if constexpr (Statistics<Rule>::along == Along::both)
    for (int64_t matrix = 0; matrix < t.batch; matrix++) {
      s.of_matrices[matrix] = 0;
      for (int64_t r = 0; r < t.rows; r++) s.of_matrices[matrix] += s.of_rows[matrix * t.rows + r];
      s.average_sums[matrix] =
          wide_sum(static_cast<const float*>(w.tensor.states[0].data[0]) + matrix * t.rows, t.rows);
    }
}

template <class Rule>
void update_factors(const Operands& w) {
  const Coefficients<Rule> coefficients(w.coefficients);
  const Tiling& t = w.tiling;
  const Scratch& s = w.scratch;
  const int64_t rows = t.batch * t.rows, columns = t.batch * t.columns;
  float* first = static_cast<float*>(w.tensor.states[0].data[0]);
  float* second = static_cast<float*>(w.tensor.states[1].data[0]);
  float *x = s.row_factors, *y = s.column_factors;
  if (w.counts.rows * w.counts.columns == 0) return;  // there is no mean
  const double of_row = double(w.counts.columns), of_column = double(w.counts.rows);
  if constexpr (Statistics<Rule>::along == Along::both) {
    for (int64_t r = 0; r < rows; r++) Rule::average(first[r], s.of_rows[r] / of_row, coefficients.k);
    for (int64_t matrix = 0; matrix < t.batch; matrix++) {
      const float* averages = first + matrix * t.rows;
      double mean = wide_sum(averages, t.rows) / double(t.rows);
      if (w.counts.rows != t.rows) {  // others have more rows; the mean of averages moves as they do
        float moved = float(s.average_sums[matrix] / of_column);
        Rule::average(moved, s.of_matrices[matrix] / (of_row * of_column), coefficients.k);
        mean = moved;
      }
      for (int64_t r = 0; r < t.rows; r++)
        x[matrix * t.rows + r] = Rule::row_factor(averages[r], mean, coefficients.k);
    }
    for (int64_t c = 0; c < columns; c++)
      Rule::average(second[c], s.of_columns[c] / of_column, coefficients.k);
    for (int64_t c = 0; c < columns; c++) y[c] = Rule::column_factor(second[c], coefficients.k);
  } else if constexpr (Statistics<Rule>::along == Along::rows) {
    for (int64_t r = 0; r < rows; r++)
      Rule::average_pair(first[r], second[r], s.of_rows[r] / of_row, coefficients.k, x[r], x[rows + r]);
  } else if constexpr (Statistics<Rule>::along == Along::columns) {
    for (int64_t c = 0; c < columns; c++)
      Rule::average_pair(first[c], second[c], s.of_columns[c] / of_column, coefficients.k, y[c],
                         y[columns + c]);
  }
}

}  // namespace DANLU_ISA
}  // namespace danlu
