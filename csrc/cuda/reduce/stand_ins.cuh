// What stands in the place of reduced states in the passes over elements: one or two numbers for a row, for a
// column.
#pragma once
#include "job.cuh"

namespace danlu {
namespace DANLU_ISA {

// What stands for the averages of the rows and columns of a chunk's elements.
template <class Rule>
class StandIns {
  using Kinds = StateKinds<Rule>;

 public:
  __device__ __forceinline__ StandIns(const Pass& pass, const Geometry& t, int64_t from) {
    if constexpr (Kinds::of_rows + Kinds::of_columns > 0) {
      const int64_t row = from / t.columns, matrix = row / t.rows;
      first_column_ = from - row * t.columns;
      left_ = int(smaller(t.columns - first_column_, int64_t(pass_chunk)));
      columns_ = int(smaller(t.columns, int64_t(pass_chunk)));
      rows_ = int(smaller(t.rows, int64_t(pass_chunk) + 1));
      // of a matrix with more rows than a chunk can touch, only how many are left counts
      row_in_matrix_ = int(larger(row - matrix * t.rows - t.rows + rows_, int64_t(0)));
      x_ = floats(pass, t.of_rows) + row;
      y_ = floats(pass, t.of_columns) + matrix * t.columns;
      x_stride_ = t.batch * t.rows;
      y_stride_ = t.batch * t.columns;
      matrix_stride_ = t.columns;
      many_ = t.batch > 1;
    }
  }

  template <int n>
  __device__ __forceinline__ void load_all(int at, float (&states)[Rule::num_states][n]) const {
    int row = 0;
    int64_t column = first_column_ + at;
    if (at >= left_) {
      // a row as long as a chunk ends once at most
      const int past = at - left_, below = columns_ < pass_chunk ? past / columns_ : 0;
      row = 1 + below;
      column = past - below * columns_;
    }
    if constexpr (n > 1)
      if (matrix_stride_ % n != 0) return load_each(row, column, states);
    load_rows<n>(row, states);
    load_columns<n>(row, column, states);
  }

 private:
  // Where rows end within a pack.
  template <int n>
  __device__ __forceinline__ void load_each(int row, int64_t column,
                                            float (&states)[Rule::num_states][n]) const {
#pragma unroll 1
    for (int i = 0; i < n; i++) {
      float one[Rule::num_states][1];
      load_rows<1>(row, one);
      load_columns<1>(row, column, one);
#pragma unroll
      for (int j = 0; j < Kinds::of_rows + Kinds::of_columns; j++)
#pragma unroll
        for (int k = 0; k < n; k++)
          if (k == i) states[j][k] = one[j][0];
      if (++column < matrix_stride_) continue;
      column = 0;
      row++;
    }
  }

  template <int n>
  __device__ __forceinline__ void load_rows(int row, float (&states)[Rule::num_states][n]) const {
#pragma unroll
    for (int j = 0; j < Kinds::of_rows; j++) {
      const float x = load(x_ + j * x_stride_ + row);
#pragma unroll
      for (int i = 0; i < n; i++) states[j][i] = x;
    }
  }

  template <int n>
  __device__ __forceinline__ void load_columns(int row, int64_t column,
                                               float (&states)[Rule::num_states][n]) const {
    if constexpr (Kinds::of_columns > 0) {
      const float* y = y_ + column;
      if (many_) y += (row_in_matrix_ + row) / rows_ * matrix_stride_;
#pragma unroll
      for (int j = 0; j < Kinds::of_columns; j++) {
        if constexpr (n > 1)
          load_packs(y + j * y_stride_, states[Kinds::of_rows + j]);
        else
          states[Kinds::of_rows + j][0] = load(y + j * y_stride_);
      }
    }
  }

  const float *x_, *y_;  // of the first element's row, of its matrix
  int64_t x_stride_, y_stride_, matrix_stride_, first_column_;
  int left_;  // elements of the first row
  int columns_, rows_, row_in_matrix_;
  bool many_;
};

}  // namespace DANLU_ISA
}  // namespace danlu
