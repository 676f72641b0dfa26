// The rows of a gradient that take part in a step: those that it lists, or some of a dense one.
#pragma once
#include <cstdint>

namespace danlu {

struct ListedRows {
  int tensor;    // its place in the list of parameters
  void* values;  // [num_values][elements of a row], in the gradient's dtype
  int64_t num_values;
  const int64_t* rows;  // ascending, each once, all of them the parameter's
  int64_t count;
  // The entries of rows[i], rows of values, are permutation[offsets[i - 1]] to permutation[offsets[i] - 1].
  // Without offsets it has one, permutation[i], and without permutation entry i.
  const int64_t *permutation, *offsets;

  int64_t first(int64_t i) const { return !offsets || i == 0 ? i : offsets[i - 1]; }
  int64_t entries(int64_t i) const { return offsets ? offsets[i] - first(i) : 1; }
  int64_t entry(int64_t i, int64_t which = 0) const {
    return permutation ? permutation[first(i) + which] : i;
  }
};

}  // namespace danlu
