// The elements of a tensor in blocks that stay in the first-level cache, with what stands for their rows and
// columns. Arrays of a block do not overlap: `ivdep` says so where they are walked over, and lets the
// compiler vectorise.
#pragma once
#include "../../common/rule_traits.h"
#include "../engine.h"
#include "../tiles.h"

namespace danlu {
namespace DANLU_ISA {

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

}  // namespace DANLU_ISA
}  // namespace danlu
