// Every format to fp32 and back, for one instruction set; included where they are compiled, see storage.h.
#pragma once
#include <type_traits>

#include "storage.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace danlu {
namespace DANLU_ISA {

// How many were converted by instructions that the compiler does not find.
template <class... E>
int64_t widen_some(float*, int64_t, const E*...) {
  return 0;
}
template <class... E>
int64_t narrow_some(const float*, int64_t, E*...) {
  return 0;
}

#if defined(__F16C__)
inline int64_t widen_some(float* to, int64_t n, const f16* from) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  return i;
}

inline int64_t narrow_some(const float* from, int64_t n, f16* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to + i),
        _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return i;
}
#endif

template <class F, class... E>
void widen_arrays(float* __restrict to, int64_t index, int64_t n, const E* __restrict... from) {
  for (int64_t i = widen_some(to, n, from...); i < n; i++) to[i] = decode<F>(index + i, from[i]...);
}

template <class F, class... E>
void narrow_arrays(const float* __restrict from, int64_t index, int64_t n, E* __restrict... to) {
  for (int64_t i = narrow_some(from, n, to...); i < n; i++) encode<F>(index + i, from[i], to[i]...);
}

template <class F, class Arrays>
struct ConversionsOf;

// The arrays of a format by their numbers.
template <class F, int... array>
struct ConversionsOf<F, std::integer_sequence<int, array...>> {
  static void widen(const Storage& from, int64_t at, int64_t index, int64_t n, float* to) {
    widen_arrays<F>(to, index, n, static_cast<const Element<F, array>*>(from.data[array]) + at...);
  }
  static void narrow(const float* from, const Storage& to, int64_t at, int64_t index, int64_t n) {
    narrow_arrays<F>(from, index, n, static_cast<Element<F, array>*>(to.data[array]) + at...);
  }
  static constexpr Conversions value = {widen, narrow};
};

template <>
struct ConversionsOf<F32, std::integer_sequence<int, 0>> {
  static constexpr Conversions value = {nullptr, nullptr};
};

template <class... F>
const Conversions& find_conversions(Format format, Types<F...>) {
  static constexpr Conversions all[] = {
      ConversionsOf<F, std::make_integer_sequence<int, num_arrays<F>>>::value...};
  return all[int(format)];
}

const Conversions& conversions_of(Format format) { return find_conversions(format, AllFormats()); }

}  // namespace DANLU_ISA
}  // namespace danlu
