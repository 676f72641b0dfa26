// Storage formats: how a number lies in memory. A format is a type that says
//   name                 as Python has it (python/danlu/formats.py)
//   Arrays               the elements of its arrays: a number has one in each
//   decode(elements...)  the number
//   encode(x, elements&...)
// and, if what it stores depends on where a number is in its tensor, `indexed`: then `index`, the number's
// row-major place, comes first in both. All bits zero must be 0, whatever the index, in a parameter's format.
// Everything else follows: tables and dispatch from the list at the end, packs and blocks of numbers in the
// engines (cpu/conversions.h, cuda/formats.cuh).
#pragma once
#include <cstdint>
#include <utility>

#include "types.h"

namespace danlu {

template <class... T>
struct Types {
  static constexpr int count = sizeof...(T);
};

template <int i, class List>
struct TypeAt;
template <int i, class First, class... Rest>
struct TypeAt<i, Types<First, Rest...>> : TypeAt<i - 1, Types<Rest...>> {};
template <class First, class... Rest>
struct TypeAt<0, Types<First, Rest...>> {
  using type = First;
};

constexpr int max_arrays = 2;  // of a format

struct F32 {
  static constexpr const char* name = "float32";
  using Arrays = Types<float>;
  RULE_FN float decode(float x) { return x; }
  RULE_FN void encode(float x, float& to) { to = x; }
};

struct Bf16 {
  static constexpr const char* name = "bfloat16";
  using Arrays = Types<bf16>;
  RULE_FN float decode(bf16 x) { return to_float(x); }
  RULE_FN void encode(float x, bf16& to) { to = from_float<bf16>::convert(x); }
};

struct F16 {
  static constexpr const char* name = "float16";
  using Arrays = Types<f16>;
  RULE_FN float decode(f16 x) { return to_float(x); }
  RULE_FN void encode(float x, f16& to) { to = from_float<f16>::convert(x); }
};

template <class F, class = void>
struct Indexed {
  static constexpr bool value = false;
};
template <class F>
struct Indexed<F, decltype(void(F::indexed))> {
  static constexpr bool value = F::indexed;
};

template <class F>
constexpr int num_arrays = F::Arrays::count;
template <class F, int array = 0>
using Element = typename TypeAt<array, typename F::Arrays>::type;

template <class F, class... E>
RULE_FN float decode(int64_t index, E... elements) {
  if constexpr (Indexed<F>::value)
    return F::decode(index, elements...);
  else
    return F::decode(elements...);
}

template <class F, class... E>
RULE_FN void encode(int64_t index, float x, E&... elements) {
  if constexpr (Indexed<F>::value)
    F::encode(index, x, elements...);
  else
    F::encode(x, elements...);
}

// What the elements of an array are to torch, and to DLPack.
enum class Kind : uint8_t { signed_integer = 0, unsigned_integer = 1, floating = 2, bfloat = 4 };
struct ArrayInfo {
  const char* dtype;
  Kind kind;
  uint8_t bytes;
};

template <class T>
struct ElementInfo;
template <>
struct ElementInfo<float> {
  static constexpr ArrayInfo value = {"float32", Kind::floating, 4};
};
template <>
struct ElementInfo<bf16> {
  static constexpr ArrayInfo value = {"bfloat16", Kind::bfloat, 2};
};
template <>
struct ElementInfo<f16> {
  static constexpr ArrayInfo value = {"float16", Kind::floating, 2};
};
template <>
struct ElementInfo<int8_t> {
  static constexpr ArrayInfo value = {"int8", Kind::signed_integer, 1};
};
template <>
struct ElementInfo<uint8_t> {
  static constexpr ArrayInfo value = {"uint8", Kind::unsigned_integer, 1};
};
template <>
struct ElementInfo<int16_t> {
  static constexpr ArrayInfo value = {"int16", Kind::signed_integer, 2};
};
template <>
struct ElementInfo<int32_t> {
  static constexpr ArrayInfo value = {"int32", Kind::signed_integer, 4};
};

// Of a parameter, its gradient and its states, for kernels that are compiled for them.
template <class... F>
struct Formats {
  static constexpr int num_values = sizeof...(F), num_states = num_values - 2;
  static constexpr bool indexed = (Indexed<F>::value || ...);

  template <int i>
  using Value = typename TypeAt<i, Types<F...>>::type;

  // How many arrays values have beside their first ones; those of the first `end` values.
  static constexpr int further_before(int end) {
    constexpr int counts[] = {num_arrays<F>...};
    int count = 0;
    for (int i = 0; i < end; i++) count += counts[i] - 1;
    return count;
  }
  static constexpr int num_further = (num_arrays<F> + ... + 0) - num_values;

  // Where a list of addresses has an array: first arrays come first, others from `further` on.
  template <int value, int array, int further>
  static constexpr int word = array == 0 ? value : further + further_before(value) + array - 1;
};

// The list of all formats. torch's, which gradients have, come first. -DDANLU_MORE_FORMATS adds those of a
// header, which says `using MoreFormats = Types<...>`, and for which of them a GPU's kernels are compiled,
// `using MoreCombinations = Types<Formats<parameter, gradient, states...>, ...>`.
}  // namespace danlu

#if defined(DANLU_MORE_FORMATS)
#include DANLU_MORE_FORMATS
#endif

namespace danlu {

#if !defined(DANLU_MORE_FORMATS)
using MoreFormats = Types<>;
using MoreCombinations = Types<>;
#endif

using TorchFormats = Types<F32, Bf16, F16>;

template <class... A, class... B>
Types<A..., B...> joined(Types<A...>, Types<B...>);
using AllFormats = decltype(joined(TorchFormats(), MoreFormats()));

// A format at run time: its place in the list.
enum class Format : uint8_t {};

template <class F, class List>
struct PlaceOf;
template <class F, class... Rest>
struct PlaceOf<F, Types<F, Rest...>> {
  static constexpr int value = 0;
};
template <class F, class First, class... Rest>
struct PlaceOf<F, Types<First, Rest...>> {
  static constexpr int value = 1 + PlaceOf<F, Types<Rest...>>::value;
};
template <class F>
constexpr Format format_of = Format(PlaceOf<F, AllFormats>::value);

struct FormatInfo {
  const char* name;
  int num_arrays;
  ArrayInfo arrays[max_arrays];
  bool indexed;
};

template <class F, class... E>
constexpr FormatInfo describe_format(Types<E...>) {
  static_assert(num_arrays<F> <= max_arrays);
  const ArrayInfo arrays[] = {ElementInfo<E>::value...};
  FormatInfo info = {F::name, num_arrays<F>, {}, Indexed<F>::value};
  for (int i = 0; i < num_arrays<F>; i++) info.arrays[i] = arrays[i];
  return info;
}

template <class List>
struct FormatTable;
template <class... F>
struct FormatTable<Types<F...>> {
  static constexpr FormatInfo infos[] = {describe_format<F>(typename F::Arrays())...};
};

inline const FormatInfo& info_of(Format format) { return FormatTable<AllFormats>::infos[int(format)]; }

template <class F>
struct Tag {
  using type = F;
};

// Calls body(Tag<F>()) for the format F of a list.
template <class... F, class Body>
RULE_FN void visit_format(Format format, Types<F...>, const Body& body) {
  (void)((format == format_of<F> && (body(Tag<F>()), true)) || ...);
}

}  // namespace danlu
