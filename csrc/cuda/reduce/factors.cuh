// What stands in the place of reduced states in the passes over elements: one or two numbers for a row, for a
// column.
#pragma once
#include "work_item.cuh"

namespace danlu {
namespace DANLU_ISA {

// Where an element lies, seen from the rows and matrices in which its chunk begins.
struct Place {
  int row;             // of all matrices
  int left;            // elements of the row from here on
  int row_in_matrix;   // counts where matrices end
  const float* y_end;  // what stands for the columns of its matrix ends there
};

// By how much a place moves: so many rows, which are so many matrices and some rows, and elements.
struct Stride {
  int matrices, rows, elements;
};

// What stands for the averages of the rows and columns of a chunk's elements. From pack to pack a thread
// moves its place on, so that it divides where it starts, and only if rows are that short.
template <class Rule, int width>
class Factors {
  using Kinds = StateKinds<Rule>;

 public:
  __device__ __forceinline__ Factors(const Pass& pass, const Geometry& t, int64_t from) {
    if constexpr (Kinds::of_rows + Kinds::of_columns > 0) {
      const int64_t row = from / t.columns, matrix = t.batch > 1 ? row / t.rows : 0;
      const int64_t column = from - row * t.columns;
      x_ = floats(pass, t.row_factors) + row;
      settled(x_);
      x_stride_ = t.batch * t.rows;
      y_stride_ = t.batch * t.columns;
      matrix_stride_ = t.columns;
      whole_packs_ = t.columns % width == 0;
      turns_ = t.batch > 1 || t.columns > pass_chunk;
      // of what is longer than a chunk only as much counts as a chunk can touch
      columns_ = int(smaller(t.columns, int64_t(pass_chunk)));
      rows_ = int(smaller(t.rows, int64_t(pass_chunk) + 1));
      first_.row = 0;
      first_.left = int(smaller(t.columns - column, int64_t(pass_chunk)));
      first_.row_in_matrix = int(larger(row - matrix * t.rows - t.rows + rows_, int64_t(0)));
      first_.y_end = floats(pass, t.column_factors) + matrix * t.columns + column + first_.left;
    }
  }

  __device__ __forceinline__ Stride stride(int elements) const {
    Stride by = {0, 0, elements};
    if (elements >= columns_) {
      by.rows = elements / columns_;
      by.elements -= by.rows * columns_;
      if (turns_) by.matrices = by.rows / rows_;
    }
    return by;
  }

  __device__ __forceinline__ Place place(int at) const {
    Place place = first_;
    if (at < place.left) {
      place.left -= at;
    } else {
      at -= place.left;
      move(place, {0, 0, place.left});
      move(place, stride(at));
    }
    return place;
  }

  __device__ __forceinline__ void move(Place& place, const Stride& by) const {
    place.row += by.rows;
    place.left -= by.elements;
    const bool ended = place.left <= 0;
    if (ended) {
      place.row++;
      place.left += columns_;
    }
    if (!turns_) return;
    if (ended) place.y_end += columns_ - matrix_stride_;  // a long row's next one is seen from its start
    place.row_in_matrix += by.rows - by.matrices * rows_ + ended;
    place.y_end += by.matrices * matrix_stride_;
    if (place.row_in_matrix >= rows_) {
      place.row_in_matrix -= rows_;
      place.y_end += matrix_stride_;
    }
  }

  // Whether no row ends within a pack.
  __device__ __forceinline__ bool whole_packs() const { return whole_packs_; }

  // Of n neighbours; whole: in one row.
  template <bool whole, int n>
  __device__ __forceinline__ void load(const Place& place, float (&states)[Rule::num_states][n]) const {
    if constexpr (whole)
      load_pack(place, states);
    else
      load_each(place, states);
  }

 private:
  template <int n>
  __device__ __forceinline__ void load_pack(const Place& place, float (&states)[Rule::num_states][n]) const {
    load_rows<n>(place, states);
    load_columns<n>(place, states);
  }

  template <int n>
  __device__ __forceinline__ void load_each(Place place, float (&states)[Rule::num_states][n]) const {
#pragma unroll 1
    for (int i = 0; i < n; i++) {
      float one[Rule::num_states][1];
      load_pack<1>(place, one);
#pragma unroll
      for (int j = 0; j < Kinds::of_rows + Kinds::of_columns; j++)
#pragma unroll
        for (int k = 0; k < n; k++)
          if (k == i) states[j][k] = one[j][0];
      move(place, {0, 0, 1});
    }
  }

  template <int n>
  __device__ __forceinline__ void load_rows(const Place& place, float (&states)[Rule::num_states][n]) const {
#pragma unroll
    for (int j = 0; j < Kinds::of_rows; j++) {
      const float x = danlu::load(x_ + j * x_stride_ + place.row);
#pragma unroll
      for (int i = 0; i < n; i++) states[j][i] = x;
    }
  }

  template <int n>
  __device__ __forceinline__ void load_columns(const Place& place,
                                               float (&states)[Rule::num_states][n]) const {
#pragma unroll
    for (int j = 0; j < Kinds::of_columns; j++)
      load_values(global(place.y_end) + j * y_stride_ - place.left, states[Kinds::of_rows + j]);
  }

  Place first_;     // the chunk's
  const float* x_;  // what stands for its row
  int64_t x_stride_, y_stride_, matrix_stride_;
  int columns_, rows_;
  bool whole_packs_, turns_;  // whether matrices, or long rows, end
};

}  // namespace DANLU_ISA
}  // namespace danlu
