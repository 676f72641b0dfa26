// Numbers of every storage format on their way between memory and registers, in packs or one by one.
#pragma once
#include "../common/formats.h"
#include "storage.cuh"

namespace danlu {

// Elements on their way to an array.
template <class E, int n>
struct Encoded {
  E* to;
  Raw<E, n> raw;
};

// The arrays of numbers of format F. `first`: the place in the tensor of the element to which they point.
template <class F>
struct Stored {
  void* arrays[num_arrays<F>];
  int64_t first;

  // at: int, or int64_t; n as for load_values()
  template <int n, class At>
  __device__ __forceinline__ void load(At at, float (&to)[n]) const {
    load_from(at, to, Numbers());
  }

  template <int n, class At>
  __device__ __forceinline__ void store(At at, const float (&from)[n]) const {
    store_to(at, from, Numbers());
  }

 private:
  using Numbers = std::make_integer_sequence<int, num_arrays<F>>;
  // elements that are numbers have a way of their own, by packs
  static constexpr bool is_number = num_arrays<F> == 1 && !Indexed<F>::value;

  template <int array>
  __device__ __forceinline__ Element<F, array>* pointer() const {
    return static_cast<Element<F, array>*>(arrays[array]);
  }

  template <int n, class At, int... array>
  __device__ __forceinline__ void load_from(At at, float (&to)[n],
                                            std::integer_sequence<int, array...>) const {
    if constexpr (is_number)
      load_values(pointer<0>() + at, to);
    else
      decode_all(first + at, to, load_raw<n>(pointer<array>() + at)...);
  }

  template <int n, class... E>
  __device__ __forceinline__ static void decode_all(int64_t index, float (&to)[n], const Raw<E, n>&... from) {
#pragma unroll
    for (int j = 0; j < n; j++) to[j] = decode<F>(index + j, from.values[j]...);
  }

  template <int n, class At, int... array>
  __device__ __forceinline__ void store_to(At at, const float (&from)[n],
                                           std::integer_sequence<int, array...>) const {
    if constexpr (is_number)
      store_values(pointer<0>() + at, from);
    else
      encode_all(first + at, from, Encoded<Element<F, array>, n>{pointer<array>() + at, {}}...);
  }

  template <int n, class... E>
  __device__ __forceinline__ static void encode_all(int64_t index, const float (&from)[n],
                                                    Encoded<E, n>... to) {
#pragma unroll
    for (int j = 0; j < n; j++) encode<F>(index + j, from[j], to.raw.values[j]...);
    (store_raw(to.to, to.raw), ...);
  }
};

}  // namespace danlu
