// What the CPU engine compiles of a rule for one instruction set.
#pragma once
#include "../common/tensor_list.h"

namespace danlu {

// Updates elements [begin, end) of a tensor with its coefficients.
using Kernel = void (*)(const Tensor&, int64_t begin, int64_t end, const float* coefficients);

// A parameter as a rule that reduces sees it, in memory's order, cut into tiles: what a thread works on at a
// time.
struct Tiling {
  int64_t batch, rows, columns;
  int64_t tile_rows, tile_columns, row_tiles, column_tiles;
};

// What one pass over a tensor leaves for the next: partial sums of tiles, from these the sums of what is
// here, which may become those of a larger tensor, and what follows from them.
struct Scratch {
  double* row_sums;       // [batch * rows][column_tiles]
  float* column_sums;     // [batch][row_tiles][columns]
  double* tile_sums;      // [tiles][sums]
  double* of_rows;        // [batch * rows]
  double* of_columns;     // [batch][columns]
  double* of_matrices;    // [batch]: of both
  double* average_sums;   // [batch]: of the averages of rows, before they move
  double* of_tensor;      // [sums], or of a rule that takes each row by itself [batch * rows][sums]
  float* row_factors;     // one or two arrays of batch * rows
  float* column_factors;  // one or two arrays of batch * columns
  float* scales;
};

// How many elements the sums are of: of the tensor, or of the one of which it is a part.
struct Counts {
  int64_t rows, columns, size;
};

// A tensor in a step whose rule reduces.
struct Operands {
  Tensor tensor;
  const float* coefficients;
  Tiling tiling;
  Scratch scratch;
  Counts counts;
  bool fits_caches;  // of one core
  Storage next;      // the gradient that this thread reads next, if it fits them too, else null
  int64_t next_size;
};

// The passes of a rule that reduces, in their order: reduce_gradient() sums statistics of the gradient along
// rows or columns, sum_statistics() adds up the tiles', update_factors() averages them; reduce_norms() sums
// over whole tensors, sum_tiles() adds up the tiles', finalize() makes their factors; apply() updates. A rule
// without such sums lacks the first or the second three. A rule that takes each row by itself does all of it
// in apply(), or where somebody has to see its sums needs_norms first and takes apply_reduced().
struct Reducer {
  static constexpr int max_scales = 4;

  int row_arrays, column_arrays;  // in place of reduced states
  bool row_sums, column_sums;
  bool whole_rows;  // no tile may end within a row
  int num_sums;
  void (*reduce_gradient)(const Operands&, int64_t tile);
  void (*sum_statistics)(const Operands&);
  void (*update_factors)(const Operands&);
  bool (*needs_norms)(const float* coefficients);  // whether a row's coefficients ask for the sums
  void (*reduce_norms)(const Operands&, int64_t tile);
  void (*sum_tiles)(const Operands&);
  void (*finalize)(const Operands&);
  void (*apply)(const Operands&, int64_t tile);
  void (*reduce_row_norms)(const Operands&, int64_t tile);
  void (*apply_reduced)(const Operands&, int64_t tile);
};

struct CpuRule {
  RuleInfo info;
  Kernel kernel;    // of an element-wise rule
  Reducer reducer;  // of any other
};

}  // namespace danlu
