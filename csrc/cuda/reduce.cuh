// The passes of rules that reduce, on a GPU. Knows no optimizer. All sums are taken in an order that follows
// from the shapes: up to 512 elements in fp32, everything after that in float64.
#pragma once
#include <type_traits>

#include "../rule_traits.h"
#include "formats.cuh"
#include "passes.h"
#include "sums.cuh"

namespace danlu {
namespace DANLU_ISA {

constexpr int pass_threads = 256, pass_warps = pass_threads / warp_size;
constexpr int pass_chunk = 16384;               // elements of a block in a pass over elements
constexpr int lane_columns = 8, lane_rows = 8;  // that a thread sums at once
constexpr int part_rows = 256;                  // of a matrix, averaged by one warp
constexpr int most_factors = 4;

// What a block works on.
template <class Rule>
struct Job {
  int tensor, index;
  const Geometry* geometry;
  Row<Rule> row;
};

// False if the block has nothing to do.
template <class Rule>
__device__ __forceinline__ bool find_job(const Pass& pass, Job<Rule>& job) {
  if (pass.found_inf && *pass.found_inf != 0.f) return false;
  const int block = int(pass.reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  job.tensor = pass.tensors ? pass.tensors[block] : pass.first_tensor + block;
  job.index = pass.tensors ? pass.indices[block] : 0;
  job.geometry = pass.geometries + job.tensor;
  const int64_t row = pass.addresses[int64_t(2 + Rule::num_states) * pass.num_tensors + job.tensor];
  if (row < 0) return false;
  job.row = row_at<Rule>(pass.rows + row * pass.row_stride, pass.clip);
  return true;
}

// Accesses by addresses that were read from memory are generic unless the compiler is told.
template <class T>
__device__ __forceinline__ T* global(T* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

template <class T>
__device__ __forceinline__ T* array(const Pass& pass, int which, int tensor) {
  return global(reinterpret_cast<T*>(pass.addresses[int64_t(which) * pass.num_tensors + tensor]));
}

template <class Rule>
__device__ __forceinline__ float* reduced_state(const Pass& pass, const Job<Rule>& job, int which) {
  return array<float>(pass, 2 + which, job.tensor);
}

__device__ __forceinline__ double* doubles(const Pass& pass, int64_t place) { return pass.scratch + place; }
__device__ __forceinline__ float* floats(const Pass& pass, int64_t place) {
  return reinterpret_cast<float*>(pass.scratch + place);
}

// ---- statistics: sums over the tiles of matrices ----

// Adds a row's statistic of eight neighbours to the sums of the row and of the columns.
template <class Rule>
__device__ __forceinline__ void add_row(const Row<Rule>& row, const float (&g)[lane_columns], float& of_row,
                                        float (&of_columns)[lane_columns]) {
#pragma unroll
  for (int j = 0; j < lane_columns; j++) {
    const float x = Rule::statistic(row.header.factor * g[j], row.k);
    of_row += x;
    of_columns[j] += x;
  }
}

// Sums of eight rows over the `lanes` neighbours that share them: each exchange halves the rows that a lane
// has. Leaves 8 / lanes of them, at least one, and says which is the first.
__device__ __forceinline__ int sum_rows(double (&x)[lane_rows], int lanes, int lane) {
  int first = 0;
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
      if (upper) first += half;
    } else {
      x[0] += __shfl_xor_sync(~0u, x[0], distance);
    }
  }
  return first;
}

template <class Rule, class G>
__global__ void __launch_bounds__(pass_threads, 2) collect_kernel(const Pass __grid_constant__ pass) {
  constexpr Along along = Statistics<Rule>::along;
  constexpr bool of_rows = along != Along::columns, of_columns = along != Along::rows;
  Job<Rule> job;
  if (!find_job(pass, job)) return;
  const Geometry& t = *job.geometry;
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  const int warps = int(t.warps), lanes = int(t.lanes);
  const int64_t tile = warps == 1 ? int64_t(job.index) * pass_warps + warp : job.index;
  if (tile >= t.batch * t.row_tiles * t.column_tiles) return;  // a whole warp, where a tile is one
  const int64_t matrix = tile / (t.row_tiles * t.column_tiles);
  const int64_t row_tile = tile / t.column_tiles % t.row_tiles, column_tile = tile % t.column_tiles;
  const int64_t first_row = row_tile * t.tile_rows, first_column = column_tile * t.tile_columns;
  const int tile_rows = int(smaller(t.tile_rows, t.rows - first_row));
  const int tile_columns = int(smaller(t.tile_columns, t.columns - first_column));
  const int lane_in_row = lane % lanes, row_of_lane = lane / lanes, rows_at_once = warp_size / lanes;
  const int rows_of_warp = rows_at_once * lane_rows;
  const G* const matrix_start = array<const G>(pass, 1, job.tensor) + matrix * t.rows * t.columns;
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
      const G* const from = global(g) + (top + row_of_lane) * stride + column;
      if (wide && column + lane_columns <= tile_columns) {
        constexpr int together = 4;  // rows that are loaded before the first is used
#pragma unroll
        for (int k = 0; k < lane_rows; k += together) {
          float values[together][lane_columns] = {};
#pragma unroll
          for (int i = 0; i < together; i++)
            if ((k + i) * rows_at_once < rows_left)
              load_packs(from + (k + i) * (rows_at_once * stride), values[i]);
#pragma unroll
          for (int i = 0; i < together; i++) add_row(job.row, values[i], rows[k + i], columns);
        }
      } else {
#pragma unroll 1
        for (int k = 0; k < lane_rows && k * rows_at_once < rows_left; k++) {
          float values[lane_columns], sum = 0.f;
#pragma unroll
          for (int j = 0; j < lane_columns; j++)
            values[j] = column + j < tile_columns ? load(from + k * (rows_at_once * stride) + j) : 0.f;
          add_row(job.row, values, sum, columns);
#pragma unroll
          for (int i = 0; i < lane_rows; i++) rows[i] += i == k ? sum : 0.f;
        }
      }
    }
    if constexpr (of_rows) {
      double sums[lane_rows];
#pragma unroll
      for (int k = 0; k < lane_rows; k++) sums[k] = rows[k];
      const int first = sum_rows(sums, lanes, lane), left = lanes < lane_rows ? lane_rows / lanes : 1;
      double* to = doubles(pass, t.row_sums) + (column_tile * t.batch + matrix) * t.rows + first_row + top +
                   row_of_lane;
#pragma unroll
      for (int i = 0; i < lane_rows; i++) {
        const int r = (first + i) * rows_at_once;
        if (i < left && lane_in_row < lane_rows && r < rows_left) store(to + r, sums[i]);
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
__device__ __forceinline__ void average_pair(const Pass& pass, const Job<Rule>& job, int64_t at, double mean,
                                             float* first, float* second) {
  float *a = reduced_state(pass, job, 0) + at, *b = reduced_state(pass, job, 1) + at;
  float s[2] = {load(a), load(b)}, instead[2];
  Rule::average_pair(s[0], s[1], mean, job.row.k, instead[0], instead[1]);
  store(a, s[0]);
  store(b, s[1]);
  store(first, instead[0]);
  store(second, instead[1]);
}

template <class Rule>
__device__ __forceinline__ void average_rows(const Pass& pass, const Job<Rule>& job, int64_t unit) {
  const Geometry t = *job.geometry;
  const Part part(t, unit);
  const int lane = threadIdx.x % warp_size;
  const int64_t rows = t.batch * t.rows;
  const double* sums = doubles(pass, t.row_sums);
  float *first = reduced_state(pass, job, 0), *x = floats(pass, t.of_rows);
  double total = 0;
  const auto average = [&](int64_t r, double sum) {
    const double mean = sum / double(t.columns);
    if constexpr (Statistics<Rule>::along == Along::both) {
      float average = load(first + r);
      Rule::average(average, mean, job.row.k);
      store(first + r, average);
      total += double(average);
    } else {
      average_pair(pass, job, r, mean, x + r, x + rows + r);
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
__device__ __forceinline__ void average_column(const Pass& pass, const Job<Rule>& job, int64_t column) {
  const Geometry t = *job.geometry;
  const int64_t columns = t.batch * t.columns, matrix = column / t.columns;
  const double* sums = doubles(pass, t.column_sums) + matrix * t.row_tiles * t.columns + column % t.columns;
  const double mean = sum_of_tiles(sums, 0, t.row_tiles, 1, t.columns) / double(t.rows);
  float* y = floats(pass, t.of_columns);
  if constexpr (Statistics<Rule>::along == Along::both) {
    float* second = reduced_state(pass, job, 1) + column;
    float average = load(second);
    Rule::average(average, mean, job.row.k);
    store(second, average);
    store(y + column, Rule::along_columns(average, job.row.k));
  } else {
    average_pair(pass, job, column, mean, y + column, y + columns + column);
  }
}

template <class Rule>
__global__ void __launch_bounds__(pass_threads) average_kernel(const Pass __grid_constant__ pass) {
  constexpr Along along = Statistics<Rule>::along;
  Job<Rule> job;
  if (!find_job(pass, job)) return;
  const Geometry t = *job.geometry;
  int64_t index = job.index;
  if constexpr (along != Along::columns) {
    const int64_t units = t.batch * t.parts, row_blocks = (units + pass_warps - 1) / pass_warps;
    if (index < row_blocks) {
      const int64_t unit = index * pass_warps + threadIdx.x / warp_size;
      if (unit < units) average_rows(pass, job, unit);
      return;
    }
    index -= row_blocks;
  }
  if constexpr (along != Along::rows) {
    const int64_t column = index * pass_threads + threadIdx.x;
    if (column < t.batch * t.columns) average_column(pass, job, column);
  }
}

// What stands in the place of a row's average depends on the mean of all of its matrix.
template <class Rule>
__global__ void __launch_bounds__(pass_threads) spread_kernel(const Pass __grid_constant__ pass) {
  Job<Rule> job;
  if (!find_job(pass, job)) return;
  const Geometry t = *job.geometry;
  const int lane = threadIdx.x % warp_size;
  const int64_t unit = int64_t(job.index) * pass_warps + threadIdx.x / warp_size;
  if (unit >= t.batch * t.parts) return;
  const Part part(t, unit);
  const double* sums = doubles(pass, t.part_sums) + part.matrix * t.parts;
  const double mean = warp_sum(sum_of_tiles(sums, lane, t.parts, warp_size, 1)) / double(t.rows);
  const float* averages = reduced_state(pass, job, 0);
  float* x = floats(pass, t.of_rows);
  for (int64_t r = part.first + lane; r < part.last; r += warp_size)
    store(x + r, Rule::along_rows(load(averages + r), mean, job.row.k));
}

// ---- passes over elements ----

// Which of its arrays a pass reads.
struct Reads {
  bool p = true, g = true, states = true, first_moment = true;
};

// The arrays of a tensor from some element on.
template <class Rule, class F>
struct Arrays {
  using Kinds = StateKinds<Rule>;
  static constexpr int first_element = Kinds::of_rows + Kinds::of_columns;
  template <int j>
  using State = std::conditional_t<first_element + j == Rule::first_moment, typename F::M, float>;

  typename F::P* p;
  const typename F::G* g;
  void* states[Kinds::elementwise > 0 ? Kinds::elementwise : 1];

  __device__ __forceinline__ Arrays(const Pass& pass, int tensor, int64_t from)
      : p(array<typename F::P>(pass, 0, tensor) + from),
        g(array<const typename F::G>(pass, 1, tensor) + from) {
    place<0>(pass, tensor, from);
  }

  template <int j>
  __device__ __forceinline__ void place(const Pass& pass, int tensor, int64_t from) {
    if constexpr (j < Kinds::elementwise) {
      states[j] = array<State<j>>(pass, 2 + first_element + j, tensor) + from;
      place<j + 1>(pass, tensor, from);
    }
  }

  template <int j>
  __device__ __forceinline__ State<j>* state() const {
    return global(static_cast<State<j>*>(states[j]));
  }

  __device__ __forceinline__ bool aligned() const {
    uintptr_t bits = reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(g);
    for (int j = 0; j < Kinds::elementwise; j++) bits |= reinterpret_cast<uintptr_t>(states[j]);
    return bits % pack_bytes == 0;
  }
};

// n neighbouring elements in registers, with what stands for the averages of their rows and columns.
template <class Rule, int n>
struct Elements {
  using Kinds = StateKinds<Rule>;
  static constexpr int elementwise = Kinds::elementwise;

  float p[n], g[n], states[Rule::num_states][n];

  template <int j = 0, class F>
  __device__ __forceinline__ void load_states(const Arrays<Rule, F>& a, int64_t at, Reads reads) {
    if constexpr (j < elementwise) {
      constexpr int which = Kinds::of_rows + Kinds::of_columns + j;
      if (which == Rule::first_moment ? reads.first_moment : reads.states)
        fill(a.template state<j>() + at, states[which]);
      load_states<j + 1>(a, at, reads);
    }
  }

  template <class F>
  __device__ __forceinline__ void load_all(const Arrays<Rule, F>& a, int64_t at, Reads reads) {
    if (!reads.p || !reads.g || !reads.states || !reads.first_moment) clear();
    if (reads.p) fill(global(a.p) + at, p);
    if (reads.g) fill(global(a.g) + at, g);
    load_states(a, at, reads);
  }

  template <int j = 0, class F>
  __device__ __forceinline__ void store_states(const Arrays<Rule, F>& a, int64_t at) const {
    if constexpr (j < elementwise) {
      empty(a.template state<j>() + at, states[Kinds::of_rows + Kinds::of_columns + j]);
      store_states<j + 1>(a, at);
    }
  }

  template <class F>
  __device__ __forceinline__ void store_all(const Arrays<Rule, F>& a, int64_t at, bool store_params) const {
    if (store_params) empty(global(a.p) + at, p);
    store_states(a, at);
  }

  __device__ __forceinline__ void measure(int i, const Row<Rule>& row,
                                          float (&sums)[Sums<Rule>::count]) const {
    float s[Rule::num_states], terms[Sums<Rule>::count];
#pragma unroll
    for (int j = 0; j < Rule::num_states; j++) s[j] = states[j][i];
    Rule::measure(p[i], row.header.factor * g[i], s, row.k, terms);
#pragma unroll
    for (int j = 0; j < Sums<Rule>::count; j++) sums[j] += terms[j];
  }

  __device__ __forceinline__ void update(int i, const Row<Rule>& row,
                                         const typename Sums<Rule>::Factors& factors) {
    float s[Rule::num_states];
#pragma unroll
    for (int j = 0; j < Rule::num_states; j++) s[j] = states[j][i];
    const float scaled = row.header.factor * g[i];
    if constexpr (Sums<Rule>::count > 0)
      p[i] = p[i] - Rule::step(p[i], scaled, s, row.k, factors);
    else
      p[i] = p[i] - Rule::step(p[i], scaled, s, row.k);
#pragma unroll
    for (int j = Kinds::of_rows + Kinds::of_columns; j < Rule::num_states; j++) states[j][i] = s[j];
  }

 private:
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < n; i++) {
      p[i] = g[i] = 0.f;
#pragma unroll
      for (int j = 0; j < Rule::num_states; j++) states[j][i] = 0.f;
    }
  }

  template <class T>
  static __device__ __forceinline__ void fill(const T* from, float (&to)[n]) {
    if constexpr (n > 1)
      load_packs(from, to);
    else
      to[0] = load(from);
  }

  template <class T>
  static __device__ __forceinline__ void empty(T* to, const float (&from)[n]) {
    if constexpr (n > 1)
      store_packs(to, from);
    else
      store(to, from[0]);
  }
};

// What stands for the averages of the rows and columns of a chunk's elements.
template <class Rule>
class Places {
  using Kinds = StateKinds<Rule>;

 public:
  __device__ __forceinline__ Places(const Pass& pass, const Geometry& t, int64_t from) {
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
      if (columns_ % n != 0) return load_each(row, column, states);
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

// Calls body(elements, place, number of them as a constant) for the elements of a chunk: in packs as wide as
// the narrowest format has them, those of a turn loaded before the first is used; then one by one.
template <class Rule, class F, class Body>
__device__ __forceinline__ void for_elements(const Arrays<Rule, F>& arrays, const Places<Rule>& places,
                                             int size, Reads reads, const Body& body) {
  constexpr int width = Packs<F>::width, packs = lane_columns / width, stride = pass_threads * width;
  constexpr bool reduced = Arrays<Rule, F>::first_element > 0;
  const int vector_end = arrays.aligned() ? size / width * width : 0;
#pragma unroll 1
  for (int first = threadIdx.x * width; first < vector_end; first += packs * stride) {
    Elements<Rule, width> e[packs];
#pragma unroll
    for (int i = 0; i < packs; i++)
      if (first + i * stride < vector_end) {
        e[i].load_all(arrays, first + i * stride, reads);
        if constexpr (reduced) places.load_all(first + i * stride, e[i].states);
      }
#pragma unroll
    for (int i = 0; i < packs; i++) {
      if (first + i * stride >= vector_end) break;
      body(e[i], first + i * stride, std::integral_constant<int, width>());
    }
  }
#pragma unroll 1
  for (int at = vector_end + threadIdx.x; at < size; at += pass_threads) {
    Elements<Rule, 1> e;
    e.load_all(arrays, at, reads);
    if constexpr (reduced) places.load_all(at, e.states);
    body(e, at, std::integral_constant<int, 1>());
  }
}

// On a multiprocessor, which bounds the registers. A rule without sums has all its arithmetic in one pass.
template <class Rule>
constexpr int resident_blocks = StateKinds<Rule>::elementwise > (Sums<Rule>::count > 0 ? 2 : 1) ? 2 : 3;

// What measure() reads: everything, but for what a rule says.
template <class Rule, class = void>
struct Measured {
  static __device__ __forceinline__ Reads reads(const typename Rule::Coeffs&) { return {}; }
};
template <class Rule>
struct Measured<Rule, decltype(void(Rule::measures_p))> {
  static __device__ __forceinline__ Reads reads(const typename Rule::Coeffs& k) {
    return {Rule::measures_p(k), true, true, false};
  }
};
template <class Rule>
struct Measured<Rule, decltype(void(Rule::measures_p_alone))> {
  static __device__ __forceinline__ Reads reads(const typename Rule::Coeffs&) {
    return {true, false, false, false};
  }
};

template <class Rule, class F>
__global__ void __launch_bounds__(pass_threads, resident_blocks<Rule>)
    measure_kernel(const Pass __grid_constant__ pass) {
  constexpr int count = Sums<Rule>::count;
  Job<Rule> job;
  if (!find_job(pass, job) || !Rule::measures(job.row.k)) return;
  const Geometry t = *job.geometry;
  const int64_t from = int64_t(job.index) * pass_chunk;
  const Arrays<Rule, F> arrays(pass, job.tensor, from);
  float sums[count] = {};
  for_elements<Rule, F>(arrays, Places<Rule>(pass, t, from), int(smaller(t.size - from, int64_t(pass_chunk))),
                        Measured<Rule>::reads(job.row.k), [&](const auto& e, int, auto width) {
#pragma unroll
                          for (int i = 0; i < decltype(width)::value; i++) e.measure(i, job.row, sums);
                        });
  double totals[count];
#pragma unroll
  for (int j = 0; j < count; j++) totals[j] = sums[j];
  block_sums<pass_threads>(totals);
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int j = 0; j < count; j++) store(doubles(pass, t.sums) + int64_t(job.index) * count + j, totals[j]);
}

template <class Rule>
__global__ void __launch_bounds__(pass_threads) settle_kernel(const Pass __grid_constant__ pass) {
  constexpr int count = Sums<Rule>::count;
  Job<Rule> job;
  if (!find_job(pass, job)) return;
  const Geometry t = *job.geometry;
  double totals[count] = {};
  if (Rule::measures(job.row.k)) {
    const int64_t chunks = (t.size + pass_chunk - 1) / pass_chunk;
    for (int64_t i = threadIdx.x; i < chunks; i += pass_threads)
#pragma unroll
      for (int j = 0; j < count; j++) totals[j] += load(doubles(pass, t.sums) + i * count + j);
  }
  block_sums<pass_threads>(totals);
  if (threadIdx.x > 0) return;
  const typename Rule::Factors factors = Rule::settle(totals, t.size, job.row.k);
  static_assert(sizeof factors <= most_factors * sizeof(float));
  __builtin_memcpy(floats(pass, t.factors), &factors, sizeof factors);
}

template <class Rule, class F>
__global__ void __launch_bounds__(pass_threads, resident_blocks<Rule>)
    step_kernel(const Pass __grid_constant__ pass) {
  Job<Rule> job;
  if (!find_job(pass, job)) return;
  const Geometry t = *job.geometry;
  const int64_t from = int64_t(job.index) * pass_chunk;
  const Arrays<Rule, F> arrays(pass, job.tensor, from);
  const bool store_params = job.row.header.store_params != 0.f;
  typename Sums<Rule>::Factors factors;
  if constexpr (Sums<Rule>::count > 0) __builtin_memcpy(&factors, floats(pass, t.factors), sizeof factors);
  for_elements<Rule, F>(arrays, Places<Rule>(pass, t, from), int(smaller(t.size - from, int64_t(pass_chunk))),
                        Reads(), [&](auto& e, int at, auto width) {
#pragma unroll
                          for (int i = 0; i < decltype(width)::value; i++) e.update(i, job.row, factors);
                          e.store_all(arrays, at, store_params);
                        });
}

// Measures, settles and updates a row; a warp for each, so that its second reading finds it in the cache.
template <class Rule, class F>
__global__ void __launch_bounds__(pass_threads) rows_kernel(const Pass __grid_constant__ pass) {
  constexpr int count = Sums<Rule>::count, width = Packs<F>::width;
  Job<Rule> job;
  if (!find_job(pass, job)) return;
  const Geometry t = *job.geometry;
  const int64_t row = int64_t(job.index) * pass_warps + threadIdx.x / warp_size;
  if (row >= t.batch * t.rows) return;
  const int lane = threadIdx.x % warp_size;
  const Arrays<Rule, F> arrays(pass, job.tensor, row * t.columns);
  const bool store_params = job.row.header.store_params != 0.f;
  const int64_t vector_end = arrays.aligned() ? t.columns / width * width : 0;
  const auto for_row = [&](Reads reads, const auto& body) {
#pragma unroll 1
    for (int64_t at = lane * width; at < vector_end; at += warp_size * width) {
      Elements<Rule, width> e;
      e.load_all(arrays, at, reads);
      body(e, at, std::integral_constant<int, width>());
    }
#pragma unroll 1
    for (int64_t at = vector_end + lane; at < t.columns; at += warp_size) {
      Elements<Rule, 1> e;
      e.load_all(arrays, at, reads);
      body(e, at, std::integral_constant<int, 1>());
    }
  };
  double totals[count] = {};
  for_row(Measured<Rule>::reads(job.row.k), [&](const auto& e, int64_t, auto n) {
    float sums[count] = {};
#pragma unroll
    for (int i = 0; i < decltype(n)::value; i++) e.measure(i, job.row, sums);
#pragma unroll
    for (int j = 0; j < count; j++) totals[j] += double(sums[j]);
  });
#pragma unroll
  for (int j = 0; j < count; j++) totals[j] = warp_sum(totals[j]);
  const typename Rule::Factors factors = Rule::settle(totals, t.columns, job.row.k);
  for_row(Reads(), [&](auto& e, int64_t at, auto n) {
#pragma unroll
    for (int i = 0; i < decltype(n)::value; i++) e.update(i, job.row, factors);
    e.store_all(arrays, at, store_params);
  });
}

template <auto kernel>
cudaError_t enqueue(const Pass& pass, unsigned blocks, cudaStream_t stream) {
  void* arguments[] = {const_cast<Pass*>(&pass)};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(pass_threads), arguments, 0, stream);
}

template <class Rule, class F>
PassKernels pass_kernels() {
  constexpr Along along = Statistics<Rule>::along;
  PassKernels k = {dtype_of<typename F::P>, dtype_of<typename F::G>, dtype_of<typename F::M>, {}};
  if constexpr (RowByRow<Rule>::value) {
    k.launch[rows_pass] = enqueue<rows_kernel<Rule, F>>;
  } else {
    if constexpr (along != Along::none) {
      k.launch[collect_pass] = enqueue<collect_kernel<Rule, typename F::G>>;
      k.launch[average_pass] = enqueue<average_kernel<Rule>>;
    }
    if constexpr (along == Along::both) k.launch[spread_pass] = enqueue<spread_kernel<Rule>>;
    if constexpr (Sums<Rule>::count > 0) {
      k.launch[measure_pass] = enqueue<measure_kernel<Rule, F>>;
      k.launch[settle_pass] = enqueue<settle_kernel<Rule>>;
    }
    k.launch[step_pass] = enqueue<step_kernel<Rule, F>>;
  }
  return k;
}

template <class Rule>
ReducingRule describe_reducing(const char* name) {
  constexpr Along along = Statistics<Rule>::along;
  ReducingRule rule = {rule_info<Rule>(name),
                       along == Along::both      ? "both"
                       : along == Along::rows    ? "rows"
                       : along == Along::columns ? "columns"
                                                 : "none",
                       Sums<Rule>::count,
                       RowByRow<Rule>::value,
                       Rule::first_moment,
                       {pass_kernels<Rule, Formats<float, float, float>>(),  //
                        pass_kernels<Rule, Formats<bf16, bf16, float>>(),    //
                        pass_kernels<Rule, Formats<bf16, float, float>>(),   //
                        pass_kernels<Rule, Formats<f16, f16, float>>(),      //
                        pass_kernels<Rule, Formats<f16, float, float>>(),    //
                        pass_kernels<Rule, Formats<float, bf16, float>>()}};
  if constexpr (Rule::first_moment >= 0) {
    rule.kernels.push_back(pass_kernels<Rule, Formats<bf16, bf16, bf16>>());
    rule.kernels.push_back(pass_kernels<Rule, Formats<float, float, bf16>>());
  }
  return rule;
}

}  // namespace DANLU_ISA
}  // namespace danlu
