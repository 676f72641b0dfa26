// Whether any of some numbers is not zero, of either sign: by bits, so that NaN and subnormal numbers count
// whatever the processor's mode.
#pragma once
#include <cstdint>

#include "../common/tensor_list.h"
#include "for_each_isa.h"

namespace danlu {
namespace any_nonzero_detail {

// Most rows that take part show it in their first block.
constexpr int64_t block = 512;

FOR_EACH_ISA static bool any(const float* x, int64_t n) {
  uint32_t bits = 0;
  int64_t i = 0;
  for (; n - i >= block && bits << 1 == 0; i += block)
    for (int64_t j = i; j < i + block; j++) bits |= as_bits(x[j]);
  if (n - i < block)
    for (; i < n; i++) bits |= as_bits(x[i]);
  return bits << 1 != 0;
}

FOR_EACH_ISA static bool any(const uint16_t* x, int64_t n) {
  uint16_t bits = 0;
  int64_t i = 0;
  for (; n - i >= block && (bits & 0x7fff) == 0; i += block)
    for (int64_t j = i; j < i + block; j++) bits |= x[j];
  if (n - i < block)
    for (; i < n; i++) bits |= x[i];
  return (bits & 0x7fff) != 0;
}

}  // namespace any_nonzero_detail

// Of elements [begin, end) of one of torch's formats.
inline bool any_nonzero(Storage x, int64_t begin, int64_t end) {
  using namespace any_nonzero_detail;
  if (x.format == format_of<F32>) return any(static_cast<const float*>(x.data[0]) + begin, end - begin);
  return any(static_cast<const uint16_t*>(x.data[0]) + begin, end - begin);  // bf16 and fp16
}

}  // namespace danlu
