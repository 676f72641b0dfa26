// Elements of a tensor between memory and registers, for every kernel that updates them or sums over them.
#pragma once
#include "../common/rule_traits.h"
#include "coefficients.cuh"
#include "formats.cuh"

namespace danlu {
namespace DANLU_ISA {

// Which of its arrays a pass reads, as far as the rule has a use for them.
struct Reads {
  bool p = true, g = true, states = true, first_moment = true;
};

// Which state that is; -1: none.
template <class Rule, class = void>
struct FirstMoment {
  static constexpr int state = 0;
};
template <class Rule>
struct FirstMoment<Rule, decltype(void(Rule::first_moment))> {
  static constexpr int state = Rule::first_moment;
};

template <int value_, int array_>
struct Array {
  static constexpr int value = value_, array = array_;
};

// Where a tensor is in memory, from some element on: parameter, gradient, and the states that have a number
// for each element.
template <class Rule, class F>
struct Arrays {
  static_assert(F::num_states == Rule::num_states);
  using Kinds = StateKinds<Rule>;
  static constexpr int first_element = Kinds::of_rows + Kinds::of_columns;
  static constexpr Uses uses = UsesOf<Rule>::value;
  template <int value>
  using Format = typename F::template Value<value>;

  void* arrays[F::num_values + F::num_further];
  int64_t first;  // place of that element in the tensor; nothing reads it unless a format asks

  // address(Array<value, array>()): of the tensor's first element
  template <class Address>
  __device__ __forceinline__ Arrays(const Address& address, int64_t from, int64_t first_) : first(first_) {
    place<0, 0>(address, from);
  }

  // Parameter, gradient, states.
  template <int value>
  __device__ __forceinline__ Stored<Format<value>> stored() const {
    return stored<value>(std::make_integer_sequence<int, num_arrays<Format<value>>>());
  }

  __device__ __forceinline__ bool aligned() const { return address_bits<0, 0>(0) % pack_bytes == 0; }

 private:
  template <int value>
  static constexpr bool is_used = value == 0   ? uses.parameter
                                  : value == 1 ? uses.gradient
                                               : value - 2 >= first_element;
  template <int value, int array>
  static constexpr int slot = F::template word<value, array, F::num_values>;

  template <int value, int array, class Address>
  __device__ __forceinline__ void place(const Address& address, int64_t from) {
    if constexpr (value < F::num_values) {
      if constexpr (is_used<value> || value == 0) {
        void*& x = arrays[slot<value, array>];
        x = static_cast<Element<Format<value>, array>*>(address(Array<value, array>())) + from;
        settled(x);
      }
      if constexpr (array + 1 < num_arrays<Format<value>>)
        place<value, array + 1>(address, from);
      else
        place<value + 1, 0>(address, from);
    }
  }

  template <int value, int... array>
  __device__ __forceinline__ Stored<Format<value>> stored(std::integer_sequence<int, array...>) const {
    return {{arrays[slot<value, array>]...}, first};
  }

  template <int value, int array>
  __device__ __forceinline__ uintptr_t address_bits(uintptr_t bits) const {
    if constexpr (value < F::num_values) {
      if constexpr (is_used<value>) bits |= reinterpret_cast<uintptr_t>(arrays[slot<value, array>]);
      if constexpr (array + 1 < num_arrays<Format<value>>)
        return address_bits<value, array + 1>(bits);
      else
        return address_bits<value + 1, 0>(bits);
    }
    return bits;
  }

  template <int value, int array>
  static constexpr size_t widest() {
    if constexpr (value == F::num_values) {
      return 1;
    } else {
      constexpr size_t size = is_used<value> ? sizeof(Element<Format<value>, array>) : 1;
      size_t others = 1;
      if constexpr (array + 1 < num_arrays<Format<value>>)
        others = widest<value, array + 1>();
      else
        others = widest<value + 1, 0>();
      return size > others ? size : others;
    }
  }

 public:
  // Elements that a thread takes at once: a pack of the widest array. Neighbouring lanes then leave no gaps
  // in any array, and every access of a warp has whole sectors.
  static constexpr int width = int(pack_bytes / widest<0, 0>());
};

// n neighbouring elements in registers; of states that are reduced what stands in their place.
template <class Rule, int n>
struct Elements {
  static constexpr Uses uses = UsesOf<Rule>::value;
  static constexpr int first_element = StateKinds<Rule>::of_rows + StateKinds<Rule>::of_columns;

  float p[n], g[n], states[Rule::num_states][n];

  // at: int, or int64_t
  template <class F, class At>
  __device__ __forceinline__ void load_all(const Arrays<Rule, F>& a, At at, Reads reads = {}) {
    load_or_clear<0>(uses.parameter && reads.p, a, at, p);
    load_or_clear<1>(uses.gradient && reads.g, a, at, g);
    load_states<first_element>(a, at, reads);
  }

  template <class F, class At>
  __device__ __forceinline__ void store_all(const Arrays<Rule, F>& a, At at, bool store_params) const {
    if (uses.outcome != Outcome::none && store_params) a.template stored<0>().store(at, p);
    store_states<first_element>(a, at);
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
                                         const typename Sums<Rule>::StepScales& scales = {}) {
    Cases<Rule>::call(coefficients.k, [&](const auto& k) {
#pragma unroll
      for (int i = 0; i < n; i++) {
        float s[Rule::num_states];
#pragma unroll
        for (int j = 0; j < Rule::num_states; j++) s[j] = states[j][i];
        const float scaled = coefficients.header.factor * g[i];
        if constexpr (Sums<Rule>::count > 0)
          p[i] = outcome<Rule>(p[i], Rule::step(p[i], scaled, s, k, scales));
        else
          p[i] = outcome<Rule>(p[i], Rule::step(p[i], scaled, s, k));
#pragma unroll
        for (int j = first_element; j < Rule::num_states; j++) states[j][i] = s[j];
      }
    });
  }

 private:
  template <int j, class F, class At>
  __device__ __forceinline__ void load_states(const Arrays<Rule, F>& a, At at, Reads reads) {
    if constexpr (j < Rule::num_states) {
      load_or_clear<2 + j>(j == FirstMoment<Rule>::state ? reads.first_moment : reads.states, a, at,
                           states[j]);
      load_states<j + 1>(a, at, reads);
    }
  }

  template <int j, class F, class At>
  __device__ __forceinline__ void store_states(const Arrays<Rule, F>& a, At at) const {
    if constexpr (j < Rule::num_states) {
      a.template stored<2 + j>().store(at, states[j]);
      store_states<j + 1>(a, at);
    }
  }

  template <int value, class F, class At>
  __device__ __forceinline__ static void load_or_clear(bool reads, const Arrays<Rule, F>& a, At at,
                                                       float (&to)[n]) {
    if (reads) return a.template stored<value>().load(at, to);
#pragma unroll
    for (int i = 0; i < n; i++) to[i] = 0.f;
  }
};

}  // namespace DANLU_ISA
}  // namespace danlu
