// A parameter of which only some rows take part in a step, as tensors that a launch takes: runs of its rows,
// each with addresses of its own. The kernels know nothing of it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

#include "listed_rows.h"
#include "tensor_list.h"

namespace danlu {

// Of a parameter with rows.
inline int64_t elements_of_row(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin() + 1, shape.end(), int64_t{1}, std::multiplies<int64_t>());
}

constexpr int64_t num_zeros = 16384;  // a chunk of the kernels

struct LazyShape {
  int64_t rows, columns;
  bool all_moments;  // the states of the other rows move too, as with a gradient and a parameter of zeros

  // `count` rows of a tensor from `row` on; the gradient's are where it says.
  Tensor part(const Tensor& t, int num_states, int64_t row, int64_t count) const {
    Tensor part = t;
    part.size = count * columns;
    part.p.data = moved(t.p, row * columns);
    for (int j = 0; j < num_states; j++) part.states[j].data = moved(t.states[j], row * columns);
    return part;
  }
};

// Calls see(tensor) for the listed rows, those together that are neighbours in parameter and gradient.
// list: each row has one entry.
template <class See>
void for_listed_rows(const LazyShape& shape, const Tensor& t, int num_states, const ListedRows& list,
                     const See& see) {
  for (int64_t i = 0, next; i < list.count; i = next) {
    const int64_t row = list.rows[i], entry = list.entry(i);
    for (next = i + 1; next < list.count; next++)
      if (list.rows[next] != row + next - i || list.entry(next) != entry + next - i) break;
    Tensor part = shape.part(t, num_states, row, next - i);
    part.g.data = moved({list.values, t.g.dtype}, entry * shape.columns);
    see(part);
  }
}

// Calls see(tensor) for the rows that are not listed, with num_zeros zeros in place of parameter and
// gradient.
template <class See>
void for_other_rows(const LazyShape& shape, const Tensor& t, int num_states, const ListedRows& list,
                    void* zeros, const See& see) {
  for (int64_t i = 0, row = 0; i <= list.count; i++) {
    const int64_t stop = i < list.count ? list.rows[i] : shape.rows;
    Tensor part = shape.part(t, num_states, row, stop - row);
    const int64_t size = part.size;
    part.p.data = part.g.data = zeros;
    for (int64_t at = 0; at < size; at += num_zeros) {
      part.size = std::min(num_zeros, size - at);
      see(part);
      for (int j = 0; j < num_states; j++) part.states[j].data = moved(part.states[j], num_zeros);
    }
    row = stop + 1;
  }
}

}  // namespace danlu
