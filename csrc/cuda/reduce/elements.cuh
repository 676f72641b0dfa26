// Elements of a tensor on their way between memory and registers.
#pragma once
#include <type_traits>

#include "stand_ins.cuh"

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
        load_values(a.template state<j>() + at, states[which]);
      load_states<j + 1>(a, at, reads);
    }
  }

  template <class F>
  __device__ __forceinline__ void load_all(const Arrays<Rule, F>& a, int64_t at, Reads reads) {
    if (!reads.p || !reads.g || !reads.states || !reads.first_moment) clear();
    if (reads.p) load_values(global(a.p) + at, p);
    if (reads.g) load_values(global(a.g) + at, g);
    load_states(a, at, reads);
  }

  template <int j = 0, class F>
  __device__ __forceinline__ void store_states(const Arrays<Rule, F>& a, int64_t at) const {
    if constexpr (j < elementwise) {
      store_values(a.template state<j>() + at, states[Kinds::of_rows + Kinds::of_columns + j]);
      store_states<j + 1>(a, at);
    }
  }

  template <class F>
  __device__ __forceinline__ void store_all(const Arrays<Rule, F>& a, int64_t at, bool store_params) const {
    if (store_params) store_values(global(a.p) + at, p);
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
};

// Calls body(elements, place, number of them as a constant) for the elements of a chunk: in packs as wide as
// the narrowest format has them, those of a turn loaded before the first is used; then one by one.
template <class Rule, class F, class Body>
__device__ __forceinline__ void for_elements(const Arrays<Rule, F>& arrays, const StandIns<Rule>& stand_ins,
                                             int size, Reads reads, const Body& body) {
  constexpr int width = Packs<F>::width, packs = turn_elements / width, stride = pass_threads * width;
  constexpr bool reduced = Arrays<Rule, F>::first_element > 0;
  const int vector_end = arrays.aligned() ? size / width * width : 0;
#pragma unroll 1
  for (int first = threadIdx.x * width; first < vector_end; first += packs * stride) {
    Elements<Rule, width> e[packs];
#pragma unroll
    for (int i = 0; i < packs; i++)
      if (first + i * stride < vector_end) {
        e[i].load_all(arrays, first + i * stride, reads);
        if constexpr (reduced) stand_ins.load_all(first + i * stride, e[i].states);
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
    if constexpr (reduced) stand_ins.load_all(at, e.states);
    body(e, at, std::integral_constant<int, 1>());
  }
}

// On a multiprocessor, which bounds the registers. A rule without sums has all its arithmetic in one pass.
template <class Rule>
constexpr int resident_blocks = StateKinds<Rule>::elementwise > (Sums<Rule>::count > 0 ? 2 : 1) ? 2 : 3;

}  // namespace DANLU_ISA
}  // namespace danlu
