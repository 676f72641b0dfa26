// From the sums over tiles the new averages of rows and columns, and what stands in their place in the passes
// over elements.
#pragma once
#include "work_item.cuh"

namespace danlu {
namespace DANLU_ISA {

constexpr int part_rows = 256;  // of a matrix, averaged by one warp

// A warp's part of the rows of a matrix.
struct Part {
  int64_t matrix, first, last;  // rows, counted over all matrices

  __device__ __forceinline__ Part(const Geometry& t, int64_t unit) : matrix(unit / t.parts) {
    first = matrix * t.rows + unit % t.parts * part_rows;
    last = smaller(first + part_rows, (matrix + 1) * t.rows);
  }
};

__device__ __forceinline__ double sum_of_tiles(const double* sums, int64_t begin, int64_t end, int64_t by,
                                               int64_t stride) {
  double sum = 0;
#pragma unroll 4
  for (int64_t tile = begin; tile < end; tile += by) sum += load(sums + tile * stride);
  return sum;
}

// Two states of one row or column, and what stands in their place.
template <class Rule>
__device__ __forceinline__ void average_pair(const Pass& pass, const WorkItem<Rule>& item, int64_t at,
                                             double mean, float* first, float* second) {
  float *a = reduced_state(pass, item, 0) + at, *b = reduced_state(pass, item, 1) + at;
  float s[2] = {load(a), load(b)}, instead[2];
  Rule::average_pair(s[0], s[1], mean, item.coefficients.k, instead[0], instead[1]);
  store(a, s[0]);
  store(b, s[1]);
  store(first, instead[0]);
  store(second, instead[1]);
}

template <class Rule>
__device__ __forceinline__ void average_rows(const Pass& pass, const WorkItem<Rule>& item, int64_t unit) {
  const Geometry t = *item.geometry;
  const Part part(t, unit);
  const int lane = threadIdx.x % warp_size;
  const int64_t rows = t.batch * t.rows;
  const double* sums = doubles(pass, t.row_sums);
  float *first = reduced_state(pass, item, 0), *x = floats(pass, t.row_factors);
  double total = 0;
  const auto average = [&](int64_t r, double sum) {
    const double mean = sum / double(t.summed_columns);
    if constexpr (Statistics<Rule>::along == Along::both) {
      float average = load(first + r);
      Rule::average(average, mean, item.coefficients.k);
      store(first + r, average);
      total += double(average);
    } else {
      average_pair(pass, item, r, mean, x + r, x + rows + r);
    }
  };
  if (part.last - part.first < warp_size && t.column_tiles >= warp_size) {  // all lanes for each row
    for (int64_t r = part.first; r < part.last; r++) {
      const double sum = warp_sum(sum_of_tiles(sums + r, lane, t.column_tiles, warp_size, rows));
      if (lane == 0) average(r, sum);
    }
  } else {
    for (int64_t r = part.first + lane; r < part.last; r += warp_size)
      average(r, sum_of_tiles(sums + r, 0, t.column_tiles, 1, rows));
  }
  if constexpr (Statistics<Rule>::along == Along::both) {
    total = warp_sum(total);
    if (lane == 0) store(doubles(pass, t.part_sums) + unit, total);
  }
}

template <class Rule>
__device__ __forceinline__ void average_column(const Pass& pass, const WorkItem<Rule>& item, int64_t column) {
  const Geometry t = *item.geometry;
  const int64_t columns = t.batch * t.columns, matrix = column / t.columns;
  const double* sums = doubles(pass, t.column_sums) + matrix * t.row_tiles * t.columns + column % t.columns;
  const double mean = sum_of_tiles(sums, 0, t.row_tiles, 1, t.columns) / double(t.summed_rows);
  float* y = floats(pass, t.column_factors);
  if constexpr (Statistics<Rule>::along == Along::both) {
    float* second = reduced_state(pass, item, 1) + column;
    float average = load(second);
    Rule::average(average, mean, item.coefficients.k);
    store(second, average);
    store(y + column, Rule::column_factor(average, item.coefficients.k));
  } else {
    average_pair(pass, item, column, mean, y + column, y + columns + column);
  }
}

template <class Rule>
__global__ void __launch_bounds__(pass_threads) update_factors_kernel(const Pass __grid_constant__ pass) {
  constexpr Along along = Statistics<Rule>::along;
  WorkItem<Rule> item;
  if (!find_work_item(pass, item)) return;
  const Geometry t = *item.geometry;
  if (t.summed_rows == 0 || t.summed_columns == 0) return;  // there is no mean
  int64_t index = item.index;
  if constexpr (along != Along::columns) {
    const int64_t units = t.batch * t.parts, row_blocks = (units + pass_warps - 1) / pass_warps;
    if (index < row_blocks) {
      const int64_t unit = index * pass_warps + threadIdx.x / warp_size;
      if (unit < units) average_rows(pass, item, unit);
      return;
    }
    index -= row_blocks;
  }
  if constexpr (along != Along::rows) {
    const int64_t column = index * pass_threads + threadIdx.x;
    if (column < t.batch * t.columns) average_column(pass, item, column);
  }
}

// Of the averages of a matrix's rows; by a warp.
template <class Rule>
__device__ __forceinline__ double mean_of_rows(const Pass& pass, const WorkItem<Rule>& item, int64_t matrix) {
  const Geometry& t = *item.geometry;
  const int lane = threadIdx.x % warp_size;
  if (t.summed_rows == t.rows) {
    const double* sums = doubles(pass, t.part_sums) + matrix * t.parts;
    return warp_sum(sum_of_tiles(sums, lane, t.parts, warp_size, 1)) / double(t.rows);
  }
  // others have more rows; the mean of averages moves as they do
  float mean = float(load(doubles(pass, t.average_sums) + matrix) / double(t.summed_rows));
  const double sum = load(doubles(pass, t.matrix_sums) + matrix);
  Rule::average(mean, sum / (double(t.summed_rows) * double(t.summed_columns)), item.coefficients.k);
  return mean;
}

// What stands in the place of a row's average depends on the mean of all of its matrix.
template <class Rule>
__global__ void __launch_bounds__(pass_threads) update_row_factors_kernel(const Pass __grid_constant__ pass) {
  WorkItem<Rule> item;
  if (!find_work_item(pass, item)) return;
  const Geometry t = *item.geometry;
  const int lane = threadIdx.x % warp_size;
  const int64_t unit = int64_t(item.index) * pass_warps + threadIdx.x / warp_size;
  if (unit >= t.batch * t.parts || t.summed_columns == 0) return;
  const Part part(t, unit);
  const double mean = mean_of_rows(pass, item, part.matrix);
  const float* averages = reduced_state(pass, item, 0);
  float* x = floats(pass, t.row_factors);
  for (int64_t r = part.first + lane; r < part.last; r += warp_size)
    store(x + r, Rule::row_factor(load(averages + r), mean, item.coefficients.k));
}

}  // namespace DANLU_ISA
}  // namespace danlu
