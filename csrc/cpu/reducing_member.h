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
  Work work;
  bool active;

  // matrix: batch, rows, columns. A tensor without elements has no tiles, and sums of 0.
  static ReducingMember of(int tensor, const Reducer& reducer, const std::array<int64_t, 3>& matrix) {
    ReducingMember m = {};
    m.tensor = tensor;
    m.reducer = &reducer;
    m.work.tiling = {matrix[0], matrix[1], matrix[2], 1, 1, 0, 0};
    if (m.elements() > 0) m.work.tiling = tiling_of(matrix[0], matrix[1], matrix[2], reducer.whole_rows);
    m.work.counts = {matrix[1], matrix[2], m.elements()};
    m.work.fits_caches = m.elements() <= tiles::size;
    return m;
  }

  int64_t elements() const { return work.tiling.batch * work.tiling.rows * work.tiling.columns; }
  int64_t tiles() const { return count(work.tiling); }

  bool collects() const { return reducer->collect; }
  bool measures() const { return reducer->measure && reducer->measures(work.row); }

  // Of float64 numbers; stops: with the sums that those who stop between passes have to see.
  size_t scratch_doubles(bool stops) const {
    Scratch s = {};
    size_t total = 0;
    for_arrays(s, stops, [&](auto* array, int64_t count) { total += doubles(array, count); });
    return total;
  }

  void place(double* room, bool stops) {
    for_arrays(work.scratch, stops, [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(room);
      room += doubles(array, count);
    });
  }

 private:
  // Calls take(pointer, count) for each array of a scratch.
  template <class Take>
  void for_arrays(Scratch& s, bool stops, const Take& take) const {
    const Tiling& t = work.tiling;
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
    take(s.along_rows, r.row_arrays * t.batch * t.rows);
    take(s.along_columns, r.column_arrays * t.batch * t.columns);
    take(s.factors, Reducer::max_factors);
  }

  template <class T>
  static size_t doubles(T*, int64_t count) {
    return size_t(divided_up(count * int64_t(sizeof(T)), sizeof(double)));
  }
};

}  // namespace danlu
