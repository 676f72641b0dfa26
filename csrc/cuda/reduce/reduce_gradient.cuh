// The pass over gradients: sums of a statistic along the rows and columns of tiles, or along one of them.
#pragma once
#include "work_item.cuh"

namespace danlu {
namespace DANLU_ISA {

constexpr int lane_columns = 8, lane_rows = 8;  // that a thread sums at once

// Adds a row's statistic of eight neighbours to the sums of the row and of the columns.
template <class Rule>
__device__ __forceinline__ void add_row(const Coefficients<Rule>& coefficients,
                                        const float (&g)[lane_columns], float& of_row,
                                        float (&of_columns)[lane_columns]) {
#pragma unroll
  for (int j = 0; j < lane_columns; j++) {
    const float x = Rule::statistic(coefficients.header.factor * g[j], coefficients.k);
    of_row += x;
    of_columns[j] += x;
  }
}

// Eight rows of a thread: eight columns of each from `from` on, and of the next one `step` elements further
// on.
template <class G>
struct Strip {
  const G* from;
  int64_t step;
  int rows_at_once,
      rows_left;  // of a warp, from which a thread takes one; of the tile, from the first one on

  __device__ __forceinline__ bool has(int row) const { return row * rows_at_once < rows_left; }
};

// Adds the statistic of a strip to the sums of its rows and columns. whole: it has all eight rows, so that
// nothing is asked, and more loads are under way.
template <bool whole, class Rule, class G>
__device__ __forceinline__ void add_strip(const Coefficients<Rule>& coefficients, Strip<G> strip,
                                          float (&of_rows)[lane_rows], float (&of_columns)[lane_columns]) {
  constexpr int together =
      whole ? pack_bytes / sizeof(G) : 2;  // rows that are loaded before the first is used
#pragma unroll
  for (int k = 0; k < lane_rows; k += together) {
    float values[together][lane_columns];
#pragma unroll
    for (int i = 0; i < together; i++, strip.from += strip.step) {
      if (whole || strip.has(k + i)) {
        load_packs(global(strip.from), values[i]);
      } else {
#pragma unroll
        for (int j = 0; j < lane_columns; j++) values[i][j] = 0.f;
      }
    }
#pragma unroll
    for (int i = 0; i < together; i++) add_row(coefficients, values[i], of_rows[k + i], of_columns);
  }
}

// Which of its eight rows a lane has the sums of.
struct Rows {
  int first, count;
};

// Sums of eight rows over the `lanes` neighbours that share them: each exchange halves the rows that a lane
// has, and leaves at least one.
__device__ __forceinline__ Rows sum_rows(double (&x)[lane_rows], int lanes, int lane) {
  Rows rows = {0, lane_rows};
#pragma unroll
  for (int level = 0; level < 5; level++) {
    const int distance = 1 << level;
    if (distance >= lanes) continue;
    const int half = (lane_rows >> level) / 2;  // of the rows that are left
    const bool upper = lane & distance;
    if (half > 0) {
#pragma unroll
      for (int i = 0; i < half; i++) {
        const double sent = upper ? x[i] : x[i + half];
        x[i] = (upper ? x[i + half] : x[i]) + __shfl_xor_sync(~0u, sent, distance);
      }
      if (upper) rows.first += half;
      rows.count = half;
    } else {
      x[0] += __shfl_xor_sync(~0u, x[0], distance);
    }
  }
  return rows;
}

// On a multiprocessor. A thread has as many bytes under way in either case; of fp32 these are more registers
// for its values, and a block's tile is twice as large, so that two blocks cover the way to the memory. With
// three, fp16's conversions would spill 8 bytes.
template <class G>
constexpr int collecting_blocks = std::is_same_v<G, bf16> ? 3 : 2;

template <class Rule, class G>
__global__ void __launch_bounds__(pass_threads, collecting_blocks<G>)
    reduce_gradient_kernel(const Pass __grid_constant__ pass) {
  constexpr Along along = Statistics<Rule>::along;
  constexpr bool of_rows = along != Along::columns, of_columns = along != Along::rows;
  WorkItem<Rule> item;
  if (!find_work_item(pass, item)) return;
  const Geometry& t = *item.geometry;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int warps = int(t.warps), lanes = int(t.lanes);
  const int64_t tile = warps == 1 ? int64_t(item.index) * pass_warps + warp : item.index;
  if (tile >= t.batch * t.row_tiles * t.column_tiles) return;  // a whole warp, where a tile is one
  const int64_t tiles_above = tile / t.column_tiles, column_tile = tile - tiles_above * t.column_tiles;
  const int64_t matrix = t.batch > 1 ? tiles_above / t.row_tiles : 0;
  const int64_t row_tile = tiles_above - matrix * t.row_tiles;
  const int64_t first_row = row_tile * t.tile_rows, first_column = column_tile * t.tile_columns;
  const int tile_rows = int(smaller(t.tile_rows, t.rows - first_row));
  const int tile_columns = int(smaller(t.tile_columns, t.columns - first_column));
  const int lane_in_row = lane % lanes, row_of_lane = lane / lanes, rows_at_once = warp_size / lanes;
  const int rows_of_warp = rows_at_once * lane_rows;
  const G* const matrix_start = array<const G>(pass, 1, item.tensor) + matrix * t.rows * t.columns;
  const G* const g = matrix_start + first_row * t.columns + first_column;
  const int64_t stride = t.columns;
  const bool wide =
      reinterpret_cast<uintptr_t>(matrix_start) % pack_bytes == 0 && stride * sizeof(G) % pack_bytes == 0;

  float columns[lane_columns] = {};
#pragma unroll 1
  for (int top = (warps == 1 ? 0 : warp) * rows_of_warp; top < tile_rows; top += warps * rows_of_warp) {
    const int rows_left = tile_rows - top - row_of_lane;
    float rows[lane_rows] = {};
#pragma unroll 1
    for (int column = lane_in_row * lane_columns; column < tile_columns; column += warp_size * lane_columns) {
      const Strip<G> strip = {global(g) + (top + row_of_lane) * stride + column, rows_at_once * stride,
                              rows_at_once, rows_left};
      if (wide && column + lane_columns <= tile_columns) {
        if (strip.has(lane_rows - 1))
          add_strip<true>(item.coefficients, strip, rows, columns);
        else
          add_strip<false>(item.coefficients, strip, rows, columns);
      } else {
#pragma unroll 1
        for (int k = 0; k < lane_rows && strip.has(k); k++) {
          float values[lane_columns], sum = 0.f;
#pragma unroll
          for (int j = 0; j < lane_columns; j++)
            values[j] = column + j < tile_columns ? load(strip.from + k * strip.step + j) : 0.f;
          add_row(item.coefficients, values, sum, columns);
#pragma unroll
          for (int i = 0; i < lane_rows; i++) rows[i] += i == k ? sum : 0.f;
        }
      }
    }
    if constexpr (of_rows) {
      double sums[lane_rows];
#pragma unroll
      for (int k = 0; k < lane_rows; k++) sums[k] = rows[k];
      const Rows mine = sum_rows(sums, lanes, lane);
      int r = mine.first * rows_at_once;
      double* to = doubles(pass, t.row_sums) + (column_tile * t.batch + matrix) * t.rows + first_row + top +
                   row_of_lane + r;
      settled(to);
#pragma unroll
      for (int i = 0; i < lane_rows; i++, r += rows_at_once, to += rows_at_once) {
        if (i >= mine.count) break;
        if (lane_in_row < lane_rows && r < rows_left) store(to, sums[i]);
      }
    }
  }

  if constexpr (of_columns) {
    SHARED_ARRAY(double, of_warps, pass_warps * warp_size * lane_columns);
    const int width = lanes * lane_columns;
    double* to = doubles(pass, t.column_sums) + (matrix * t.row_tiles + row_tile) * t.columns + first_column;
#pragma unroll
    for (int j = 0; j < lane_columns; j++) {
      double sum = columns[j];
      for (int distance = lanes; distance < warp_size; distance *= 2)
        sum += __shfl_xor_sync(~0u, sum, distance);
      const int at = lane_in_row * lane_columns + j;
      if (row_of_lane > 0) continue;
      if (warps > 1)
        of_warps[warp * width + at] = sum;
      else if (at < tile_columns)
        store(to + at, sum);
    }
    if (warps == 1) return;
    __syncthreads();
    const int at = threadIdx.x;
    if (at >= tile_columns) return;
    double sum = of_warps[at];
    for (int i = 1; i < warps; i++) sum += of_warps[i * width + at];
    store(to + at, sum);
  }
}

}  // namespace DANLU_ISA
}  // namespace danlu
