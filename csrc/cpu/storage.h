// Storage formats on the CPU: fp32 is used where it lies, 16-bit values pass through a buffer in the
// first-level cache. One rule loop thus serves every combination of dtypes; the conversions cost less than
// the memory traffic they wait for.
#pragma once
#include "../tensor_list.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace danlu {
namespace DANLU_ISA {

template <class T>
void widen(const T* __restrict from, float* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}

template <class T>
void narrow(const float* __restrict from, T* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = from_float<T>::convert(from[i]);
}

#if defined(__F16C__)
template <>
inline void widen<f16>(const f16* __restrict from, float* __restrict to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < n; i++) to[i] = to_float(from[i]);
}

template <>
inline void narrow<f16>(const float* __restrict from, f16* __restrict to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to + i),
        _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  for (; i < n; i++) to[i] = from_float<f16>::convert(from[i]);
}
#endif

// One stored array, seen as fp32 block by block.
class Lane {
 public:
  static constexpr int64_t buffer_size = 1024;  // four lanes of 4 KB stay in a 32 KB cache

  explicit Lane(Storage storage) : storage_(storage) {}

  bool direct() const { return storage_.dtype == Dtype::f32; }

  float* load(int64_t at, int64_t n) {
    switch (storage_.dtype) {
      case Dtype::bf16:
        widen(static_cast<const bf16*>(storage_.data) + at, buffer_, n);
        return buffer_;
      case Dtype::f16:
        widen(static_cast<const f16*>(storage_.data) + at, buffer_, n);
        return buffer_;
      case Dtype::f32:
        break;
    }
    return static_cast<float*>(storage_.data) + at;
  }

  // what load() gave goes back, rounded to nearest even; nothing to do where it was updated in place
  void store(int64_t at, int64_t n) {
    switch (storage_.dtype) {
      case Dtype::bf16:
        return narrow(buffer_, static_cast<bf16*>(storage_.data) + at, n);
      case Dtype::f16:
        return narrow(buffer_, static_cast<f16*>(storage_.data) + at, n);
      case Dtype::f32:
        break;
    }
  }

 private:
  Storage storage_;
  alignas(64) float buffer_[buffer_size];
};

}  // namespace DANLU_ISA
}  // namespace danlu
