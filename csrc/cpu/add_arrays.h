// Sums in the dtype of what is added: each addition rounds to it.
#pragma once
#include <cstdint>

#include "../common/tensor_list.h"
#include "for_each_isa.h"

namespace danlu {
namespace add_arrays_detail {

// Not a template, which cannot be compiled for each instruction set.
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

// sum: n elements of one of torch's formats that are none of a and b, or exactly those of one of them.
inline void add_arrays(const void* a, const void* b, Storage sum, int64_t n) {
  visit_format(sum.format, TorchFormats(), [&](auto tag) {
    using E = Element<typename decltype(tag)::type>;
    add_arrays_detail::add(static_cast<const E*>(a), static_cast<const E*>(b), static_cast<E*>(sum.data[0]),
                           n);
  });
}

}  // namespace danlu
