// Elements of a tensor on their way between memory and registers.
#pragma once
#include <type_traits>

#include "factors.cuh"

namespace danlu {
namespace DANLU_ISA {

constexpr int turn_elements = 8;  // of a thread in a turn of the loop over a chunk

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

  template <int j>
  static constexpr size_t state_size() {
    if constexpr (j < Kinds::elementwise)
      return sizeof(State<j>);
    else
      return 1;
  }
  static constexpr int width = pack_width(
      {sizeof(typename F::P), sizeof(typename F::G), state_size<0>(), state_size<1>(), state_size<2>()});

  typename F::P* p;
  const typename F::G* g;
  void* states[Kinds::elementwise > 0 ? Kinds::elementwise : 1];

  __device__ __forceinline__ Arrays(const Pass& pass, int tensor, int64_t from)
      : p(array<typename F::P>(pass, 0, tensor) + from),
        g(array<const typename F::G>(pass, 1, tensor) + from) {
    settled(p), settled(g);
    place<0>(pass, tensor, from);
  }

  template <int j>
  __device__ __forceinline__ void place(const Pass& pass, int tensor, int64_t from) {
    if constexpr (j < Kinds::elementwise) {
      states[j] = array<State<j>>(pass, 2 + first_element + j, tensor) + from;
      settled(states[j]);
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

  // at: int, or int64_t
  template <int j = 0, class F, class At>
  __device__ __forceinline__ void load_states(const Arrays<Rule, F>& a, At at, Reads reads) {
    if constexpr (j < elementwise) {
      constexpr int which = Kinds::of_rows + Kinds::of_columns + j;
      load_or_clear(which == Rule::first_moment ? reads.first_moment : reads.states,
                    a.template state<j>() + at, states[which]);
      load_states<j + 1>(a, at, reads);
    }
  }

  template <class F, class At>
  __device__ __forceinline__ void load_all(const Arrays<Rule, F>& a, At at, Reads reads) {
    load_or_clear(reads.p, global(a.p) + at, p);
    load_or_clear(reads.g, global(a.g) + at, g);
    load_states(a, at, reads);
  }

  template <int j = 0, class F, class At>
  __device__ __forceinline__ void store_states(const Arrays<Rule, F>& a, At at) const {
    if constexpr (j < elementwise) {
      store_values(a.template state<j>() + at, states[Kinds::of_rows + Kinds::of_columns + j]);
      store_states<j + 1>(a, at);
    }
  }

  template <class F, class At>
  __device__ __forceinline__ void store_all(const Arrays<Rule, F>& a, At at, bool store_params) const {
    if (store_params) store_values(global(a.p) + at, p);
    store_states(a, at);
  }

  __device__ __forceinline__ void add_norms(const Coefficients<Rule>& coefficients,
                                            float (&sums)[Sums<Rule>::count]) const {
    Cases<Rule>::call(coefficients.k, [&](const auto& k) {
#pragma unroll
      for (int i = 0; i < n; i++) {
        float s[Rule::num_states], terms[Sums<Rule>::count];
#pragma unroll
        for (int j = 0; j < Rule::num_states; j++) s[j] = states[j][i];
        Rule::norm_terms(p[i], coefficients.header.factor * g[i], s, k, terms);
#pragma unroll
        for (int j = 0; j < Sums<Rule>::count; j++) sums[j] += terms[j];
      }
    });
  }

  __device__ __forceinline__ void update(const Coefficients<Rule>& coefficients,
                                         const typename Sums<Rule>::StepScales& scales) {
    Cases<Rule>::call(coefficients.k, [&](const auto& k) {
#pragma unroll
      for (int i = 0; i < n; i++) {
        float s[Rule::num_states];
#pragma unroll
        for (int j = 0; j < Rule::num_states; j++) s[j] = states[j][i];
        const float scaled = coefficients.header.factor * g[i];
        if constexpr (Sums<Rule>::count > 0)
          p[i] = p[i] - Rule::step(p[i], scaled, s, k, scales);
        else
          p[i] = p[i] - Rule::step(p[i], scaled, s, k);
#pragma unroll
        for (int j = Kinds::of_rows + Kinds::of_columns; j < Rule::num_states; j++) states[j][i] = s[j];
      }
    });
  }

 private:
  template <class T>
  __device__ __forceinline__ static void load_or_clear(bool reads, const T* from, float (&to)[n]) {
    if (reads) return load_values(from, to);
#pragma unroll
    for (int i = 0; i < n; i++) to[i] = 0.f;
  }
};

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
