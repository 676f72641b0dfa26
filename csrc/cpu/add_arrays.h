// Sums in the dtype of what is added: each addition rounds to it.
#pragma once
#include <cstdint>

#include "../common/tensor_list.h"
#include "for_each_isa.h"

namespace danlu {
namespace add_arrays_detail {

FOR_EACH_ISA static void add(const float* a, const float* b, float* sum, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) sum[i] = a[i] + b[i];
}

FOR_EACH_ISA static void add(const bf16* a, const bf16* b, bf16* sum, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) sum[i] = from_float<bf16>::convert(to_float(a[i]) + to_float(b[i]));
}

FOR_EACH_ISA static void add(const f16* a, const f16* b, f16* sum, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) sum[i] = from_float<f16>::convert(to_float(a[i]) + to_float(b[i]));
}

}  // namespace add_arrays_detail

// sum: n elements that are none of a and b, or exactly those of one of them.
inline void add_arrays(const void* a, const void* b, Storage sum, int64_t n) {
  using add_arrays_detail::add;
  switch (sum.dtype) {
    case Dtype::f32:
      return add(static_cast<const float*>(a), static_cast<const float*>(b), static_cast<float*>(sum.data),
                 n);
    case Dtype::bf16:
      return add(static_cast<const bf16*>(a), static_cast<const bf16*>(b), static_cast<bf16*>(sum.data), n);
    case Dtype::f16:
      return add(static_cast<const f16*>(a), static_cast<const f16*>(b), static_cast<f16*>(sum.data), n);
  }
}

}  // namespace danlu
