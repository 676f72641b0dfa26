// 16-bit values to fp32 and back, for one instruction set; included where they are compiled, see storage.h.
#pragma once
#include "storage.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace danlu {
namespace DANLU_ISA {

void widen(const bf16* __restrict from, float* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}

void narrow(const float* __restrict from, bf16* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = from_float<bf16>::convert(from[i]);
}

void widen(const f16* __restrict from, float* __restrict to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; i++) to[i] = to_float(from[i]);
}

void narrow(const float* __restrict from, f16* __restrict to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to + i),
        _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; i++) to[i] = from_float<f16>::convert(from[i]);
}

}  // namespace DANLU_ISA
}  // namespace danlu
