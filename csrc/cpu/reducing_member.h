// A tensor of a step whose rule reduces, and the room that its passes need.
#pragma once
#include <array>
#include <cstdint>
#include <type_traits>

#include "tiles.h"

namespace danlu {

struct ReducingMember {
  int tensor;  // its place among those of the step
  const Reducer* reducer;
  Operands operands;
  bool active;

  // matrix: batch, rows, columns. A tensor without elements has no tiles, and sums of 0.
  static ReducingMember of(int tensor, const Reducer& reducer, const std::array<int64_t, 3>& matrix) {
    ReducingMember m = {};
    m.tensor = tensor;
    m.reducer = &reducer;
    m.operands.tiling = {matrix[0], matrix[1], matrix[2], 1, 1, 0, 0};
    if (m.elements() > 0) m.operands.tiling = tiling_of(matrix[0], matrix[1], matrix[2], reducer.whole_rows);
    m.operands.counts = {matrix[1], matrix[2], m.elements()};
    m.operands.fits_caches = m.elements() <= tiles::size;
    return m;
  }

  int64_t elements() const { return operands.tiling.batch * operands.tiling.rows * operands.tiling.columns; }
  int64_t tiles() const { return count(operands.tiling); }

  bool collects() const { return reducer->reduce_gradient; }
  bool needs_norms() const { return reducer->reduce_norms && reducer->needs_norms(operands.coefficients); }

  // Of float64 numbers; stops: with the sums that those who stop between passes have to see.
  size_t scratch_doubles(bool stops) const {
    Scratch s = {};
    size_t total = 0;
    for_arrays(s, stops, [&](auto* array, int64_t count) { total += doubles(array, count); });
    return total;
  }

  void place(double* room, bool stops) {
    for_arrays(operands.scratch, stops, [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(room);
      room += doubles(array, count);
    });
  }

 private:
  // Calls take(pointer, count) for each array of a scratch.
  template <class Take>
  void for_arrays(Scratch& s, bool stops, const Take& take) const {
    const Tiling& t = operands.tiling;
    const Reducer& r = *reducer;
    const bool both = r.row_sums && r.column_sums;
    take(s.row_sums, r.row_sums * t.batch * t.rows * t.column_tiles);
    take(s.column_sums, r.column_sums * t.batch * t.row_tiles * t.columns);
    take(s.tile_sums, r.whole_rows ? 0 : r.num_sums * count(t));
    take(s.of_rows, r.row_sums * t.batch * t.rows);
    take(s.of_columns, r.column_sums * t.batch * t.columns);
    take(s.of_matrices, both * t.batch);
    take(s.average_sums, both * t.batch);
    take(s.of_tensor, r.num_sums * (r.whole_rows ? stops * t.batch * t.rows : 1));
    take(s.row_factors, r.row_arrays * t.batch * t.rows);
    take(s.column_factors, r.column_arrays * t.batch * t.columns);
    take(s.scales, Reducer::max_scales);
  }

  template <class T>
  static size_t doubles(T*, int64_t count) {
    return size_t(divided_up(count * int64_t(sizeof(T)), sizeof(double)));
  }
};

}  // namespace danlu
