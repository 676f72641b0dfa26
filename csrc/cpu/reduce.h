// The passes of rules that reduce, over one tile of a tensor. Knows no optimizer.
//
// A rule may have statistics (statistic(), average...(): sums of its gradient along the rows or the columns
// of a matrix, from which its reduced states and what stands in their place for each row or column follow),
// and sums (needs_norms(), reduce_norms(), finalize(): over a whole tensor, or over each of its rows where
// the rule says row_by_row, from which the scales of its step follow). Sums of a tile are fp32 sums of up to
// 4,096 elements, each position of a block by itself; everything after that is float64, in a fixed order.
#pragma once
#include "../common/rule_traits.h"
#include "engine.h"
#include "tiles.h"

namespace danlu {
namespace DANLU_ISA {

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef double Doubles __attribute__((vector_size(64)));
typedef float HalfFloats __attribute__((vector_size(32), aligned(4)));

template <class Rule>
struct Coefficients {
  CoefficientsHeader header;
  typename Rule::Coeffs k;

  explicit Coefficients(const float* row) {
    __builtin_memcpy(&header, row, sizeof header);
    __builtin_memcpy(&k, row + sizeof header / sizeof(float), sizeof k);
  }
};

// Up to tiles::width consecutive elements: of one row, or several narrow rows.
struct Block {
  float* p;
  const float* g;
  const float* of_row[2];  // of one row: a number; of several: an array as long as the block
  const float* of_column[2];
  float* element[3];
  int64_t n;
};

// Columns so few that several rows make a block.
RULE_FN bool is_narrow(const Tiling& t) { return 2 * t.columns <= tiles::narrow_width; }

// In a fixed order, whatever the width of the machine's vectors.
static inline double lane_sum(const float* x, int64_t n) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; j++) sums[j] += *reinterpret_cast<const Floats*>(x + i + 16 * j);
  for (; i + 16 <= n; i += 16) sums[0] += *reinterpret_cast<const Floats*>(x + i);
  const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  const HalfFloats half = __builtin_shufflevector(sum, sum, 0, 1, 2, 3, 4, 5, 6, 7) +
                          __builtin_shufflevector(sum, sum, 8, 9, 10, 11, 12, 13, 14, 15);
  const HalfFloats quarter = half + __builtin_shufflevector(half, half, 4, 5, 6, 7, 0, 1, 2, 3);
  const HalfFloats eighth = quarter + __builtin_shufflevector(quarter, quarter, 2, 3, 0, 1, 6, 7, 4, 5);
  float rest = eighth[0] + eighth[1];
  for (; i < n; i++) rest += x[i];
  return rest;
}

static inline double wide_sum(const float* x, int64_t n) {
  Doubles sums[4] = {};
  const int64_t whole = n / 32 * 32;
  for (int64_t i = 0; i < whole; i += 32)
    for (int j = 0; j < 4; j++)
      sums[j] += __builtin_convertvector(*reinterpret_cast<const HalfFloats*>(x + i + 8 * j), Doubles);
  const Doubles sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double rest = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
  for (int64_t i = whole; i < n; i++) rest += double(x[i]);
  return rest;
}

// Asks for elements that will be needed soon. Only for tensors that stay in the second-level cache: others
// would push out what is at work.
static inline void ask_for(const Storage& s, int64_t at, int64_t n) {
  const FormatInfo& format = info_of(s.format);
  for (int array = 0; array < format.num_arrays; array++) {
    const int64_t bytes = format.arrays[array].bytes;
    const char* from = static_cast<const char*>(s.data[array]) + at * bytes;
    for (int64_t i = 0; i < n * bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  }
}

template <class Rule, bool narrow>
RULE_FN void load_states(float (&s)[Rule::num_states], const Block& b, int64_t i) {
  using Kinds = StateKinds<Rule>;
  // unrolled, or the loop around them is not vectorised
#pragma GCC unroll 2
  for (int j = 0; j < Kinds::of_rows; j++) s[j] = b.of_row[j][narrow ? i : 0];
#pragma GCC unroll 2
  for (int j = 0; j < Kinds::of_columns; j++) s[Kinds::of_rows + j] = b.of_column[j][i];
#pragma GCC unroll 3
  for (int j = 0; j < Kinds::elementwise; j++) s[Kinds::of_rows + Kinds::of_columns + j] = b.element[j][i];
}

// The passes over one block. Arrays of a block do not overlap: `ivdep` says so, and lets the compiler
// vectorise.

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

// The arrays of a tensor, opened block by block.
template <class Rule>
class Blocks {
  using Kinds = StateKinds<Rule>;
  static constexpr int first_element = Kinds::of_rows + Kinds::of_columns;
  // without states of rows or columns a block of narrow rows is like any other
  static constexpr bool has_narrow = first_element > 0;

 public:
  // Whether visit() changes states, and parameters.
  struct Stores {
    bool states, params;
  };

  Blocks(const Operands& w, Stores stores)
      : w_(w),
        t_(w.tiling),
        stores_(stores),
        p_(w.tensor.p, w.tensor.first),
        g_(w.tensor.g, w.tensor.first),
        elements_{Lane(state(0), w.tensor.first), Lane(state(1), w.tensor.first),
                  Lane(state(2), w.tensor.first)} {}

  // Calls body(block, narrow) for the blocks of some rows of a tile; `narrow` is a constant that tells how
  // the block has its numbers of rows.
  template <class Body>
  void visit(const Tile& tile, int64_t first_row, int64_t rows, const Body& body) {
    if constexpr (has_narrow)
      if (is_narrow(t_)) return visit_narrow(tile, first_row, rows, body);
    for (int64_t r = first_row; r < first_row + rows; r++) {
      const int64_t row = tile.matrix * t_.rows + r;
      for (int64_t c = tile.column; c < tile.column + tile.columns; c += tiles::width) {
        Block b;
        for (int j = 0; j < Kinds::of_rows; j++) b.of_row[j] = row_factors(j) + row;
        for (int j = 0; j < Kinds::of_columns; j++) b.of_column[j] = column_factors(j, tile.matrix) + c;
        b.n = at_most(tile.column + tile.columns - c, tiles::width);
        open(b, row * t_.columns + c, body, Constant<false>());
      }
    }
  }

 private:
  template <bool x>
  struct Constant {
    static constexpr bool value = x;
  };

  template <class Body>
  void visit_narrow(const Tile& tile, int64_t first_row, int64_t rows, const Body& body) {
    const int64_t height = tiles::narrow_width / t_.columns, last = first_row + rows;
    alignas(64) float spread[2][tiles::narrow_width], repeated[2][tiles::narrow_width];
    for (int j = 0; j < Kinds::of_columns; j++)
      for (int64_t k = 0; k < at_most(height, rows); k++)
        __builtin_memcpy(repeated[j] + k * t_.columns, column_factors(j, tile.matrix),
                         t_.columns * sizeof(float));
    for (int64_t r = first_row; r < last; r += height) {
      const int64_t row = tile.matrix * t_.rows + r, here = at_most(last - r, height);
      Block b;
      for (int j = 0; j < Kinds::of_rows; j++) {
        for (int64_t k = 0; k < here; k++) {
          const float x = row_factors(j)[row + k];
          float* to = spread[j] + k * t_.columns;
          for (int64_t c = 0; c < t_.columns; c++) to[c] = x;
        }
        b.of_row[j] = spread[j];
      }
      for (int j = 0; j < Kinds::of_columns; j++) b.of_column[j] = repeated[j];
      b.n = here * t_.columns;
      open(b, row * t_.columns, body, Constant<true>());
    }
  }

  template <class Body, class Narrow>
  void open(Block& b, int64_t at, const Body& body, Narrow narrow) {
    b.p = p_.load(at, b.n);
    b.g = g_.load(at, b.n);
    for (int j = 0; j < Kinds::elementwise; j++) b.element[j] = elements_[j].load(at, b.n);
    body(b, narrow);
    if (stores_.params) p_.store(at, b.n);
    if (stores_.states)
      for (int j = 0; j < Kinds::elementwise; j++) elements_[j].store(at, b.n);
    if (stores_.states && w_.next.data[0] && at < w_.next_size)
      ask_for(w_.next, at, at_most(w_.next_size - at, b.n));
  }

  Storage state(int j) const {
    return j < Kinds::elementwise ? w_.tensor.states[first_element + j] : Storage{};
  }
  const float* row_factors(int j) const { return w_.scratch.row_factors + j * t_.batch * t_.rows; }
  const float* column_factors(int j, int64_t matrix) const {
    return w_.scratch.column_factors + (j * t_.batch + matrix) * t_.columns;
  }

  const Operands& w_;
  const Tiling& t_;
  const Stores stores_;
  Lane p_, g_, elements_[3];
};

// Sums of the columns of a small matrix.
static inline void add_rows(const float* __restrict x, int64_t rows, int64_t columns,
                            float* __restrict sums) {
  for (int64_t c = 0; c < columns; c++) sums[c] = x[c];
  for (int64_t r = 1; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) sums[c] += x[r * columns + c];
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
