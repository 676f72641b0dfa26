// Elements of a chunk, in the order in which a block's threads take them.
#pragma once
#include "../elements.cuh"
#include "factors.cuh"

namespace danlu {
namespace DANLU_ISA {

constexpr int turn_elements = 8;  // of a thread in a turn of the loop over a chunk

// Of a tensor from some element on.
template <class Rule, class F>
__device__ __forceinline__ Arrays<Rule, F> arrays_of(const Pass& pass, int tensor, int64_t from) {
  const auto address = [&](auto a) {
    constexpr int row = F::template word<a.value, a.array, row_of_coefficients<Rule> + 1>;
    return array<void>(pass, row, tensor);
  };
  return Arrays<Rule, F>(address, from, from);
}

// Calls body(elements, where they begin) for elements of a chunk in packs of n, of which those of a turn are
// loaded before the first is used. whole: no row ends within a pack.
template <int n, int packs, bool whole, class Rule, class F, int width, class Body>
__device__ __forceinline__ void for_packs(const Arrays<Rule, F>& arrays, const Factors<Rule, width>& factors,
                                          int begin, int end, Reads reads, const Body& body) {
  constexpr int stride = pass_threads * n;
  constexpr bool reduced = Arrays<Rule, F>::first_element > 0;
  constexpr bool late = StateKinds<Rule>::of_columns > 1;  // would need too many registers for all of a turn
  begin += threadIdx.x * n;
  if (begin >= end) return;
  Place place;
  Stride by;
  if constexpr (reduced) {
    place = factors.place(begin);
    by = factors.stride(stride);
  }
#pragma unroll 1
  for (int first = begin; first < end; first += packs * stride) {
    Elements<Rule, n> e[packs];
#pragma unroll
    for (int i = 0; i < packs; i++) {
      if (first + i * stride < end) {
        e[i].load_all(arrays, first + i * stride, reads);
        if constexpr (reduced && !late) factors.template load<whole>(place, e[i].states);
      }
      if constexpr (reduced && !late) factors.move(place, by);
    }
#pragma unroll
    for (int i = 0; i < packs; i++) {
      if (first + i * stride >= end) break;
      if constexpr (reduced && late) {
        factors.template load<whole>(place, e[i].states);
        factors.move(place, by);
      }
      body(e[i], first + i * stride);
    }
  }
}

// ... for all elements of a chunk, those behind the last pack one by one.
template <class Rule, class F, class Body>
__device__ __forceinline__ void for_elements(const Arrays<Rule, F>& arrays,
                                             const Factors<Rule, Arrays<Rule, F>::width>& factors, int size,
                                             Reads reads, const Body& body) {
  constexpr int width = Arrays<Rule, F>::width;
  int vector_end = arrays.aligned() ? size / width * width : 0;
  settled(vector_end);
  constexpr int packs = turn_elements / width;
  bool whole = true;
  if constexpr (Arrays<Rule, F>::first_element > 0) {
    whole = factors.whole_packs();
    if (!whole) for_packs<width, 1, false>(arrays, factors, 0, vector_end, reads, body);
  }
  if (whole) for_packs<width, packs, true>(arrays, factors, 0, vector_end, reads, body);
  for_packs<1, 1, true>(arrays, factors, vector_end, size, reads, body);
}

// On a multiprocessor, which bounds the registers. A rule without sums has all its arithmetic in one pass.
template <class Rule>
constexpr int resident_blocks = StateKinds<Rule>::elementwise > (Sums<Rule>::count > 0 ? 2 : 1) ? 2 : 3;

}  // namespace DANLU_ISA
}  // namespace danlu
