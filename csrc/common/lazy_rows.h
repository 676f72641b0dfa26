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
    part.first += row * columns;
    part.p = moved(t.p, row * columns);
    for (int j = 0; j < num_states; j++) part.states[j] = moved(t.states[j], row * columns);
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
    part.g = moved({{list.values}, t.g.format}, entry * shape.columns);
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
    place_at(part.p, zeros);
    place_at(part.g, zeros);
    for (int64_t at = 0; at < size; at += num_zeros) {
      part.size = std::min(num_zeros, size - at);
      see(part);
      part.first += num_zeros;
      for (int j = 0; j < num_states; j++) part.states[j] = moved(part.states[j], num_zeros);
    }
    row = stop + 1;
  }
}

// The tensors of a step as a launch takes them: whole, or runs of their rows where they are lazy.
struct LaunchedTensors {
  const std::vector<Tensor>& tensors;
  const std::vector<ListedRows>& listed;  // in the order of the tensors
  const std::vector<LazyShape>& shapes;   // of each tensor; without rows where it is not lazy

  // The rows of a tensor that this step lists; null where it is not lazy.
  const ListedRows* list_of(size_t tensor) const {
    const auto before = [](const ListedRows& list, int tensor) { return list.tensor < tensor; };
    const auto found = std::lower_bound(listed.begin(), listed.end(), int(tensor), before);
    return found != listed.end() && found->tensor == int(tensor) ? &*found : nullptr;
  }

  // Elements behind the address of a gradient.
  int64_t gradient_size(size_t tensor) const {
    const ListedRows* list = list_of(tensor);
    return list ? list->num_values * shapes[tensor].columns : tensors[tensor].size;
  }

  // Calls see(tensor, index) for some tensors with as many states; at last those whose states alone move, as
  // a launch takes coefficients on the device in ascending order. idle: how far behind the coefficient
  // row of listed rows that of the others is; zeros: the address of num_zeros fp32 zeros where the kernels
  // run; no zeros: no states move alone.
  template <class Index, class See>
  void for_each(Index begin, Index end, int num_states, int idle, uintptr_t zeros, const See& see) const {
    for (Index index = begin; index != end; ++index) {
      const size_t i = *index;
      const Tensor& t = tensors[i];
      if (t.coefficients < 0) continue;
      if (const ListedRows* list = list_of(i))
        for_listed_rows(shapes[i], t, num_states, *list, [&](const Tensor& run) { see(run, i); });
      else
        see(t, i);
    }
    if (!zeros) return;
    for (Index index = begin; index != end; ++index) {
      const size_t i = *index;
      Tensor t = tensors[i];
      if (t.coefficients < 0 || !shapes[i].all_moments) continue;
      t.coefficients += idle;
      for_other_rows(shapes[i], t, num_states, *list_of(i), reinterpret_cast<void*>(zeros),
                     [&](const Tensor& run) { see(run, i); });
    }
  }
};

}  // namespace danlu
