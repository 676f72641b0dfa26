// Elements of arrays and their conversions to and from fp32: plain bit operations that every compiler takes,
// and on a GPU the one instruction that does the same.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define RULE_FN static __host__ __device__ __forceinline__
#else
#define RULE_FN static inline __attribute__((always_inline))
#endif

namespace danlu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

RULE_FN float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

RULE_FN uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

RULE_FN float to_float(bf16 x) { return as_float(uint32_t(x.bits) << 16); }

RULE_FN float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t rest = uint32_t(x.bits & 0x7fffu) << 13;
  // 2^112 moves the exponent from fp16's bias to fp32's; exact for subnormals too, as long as nothing flushes
  // them
  const float finite = as_float(rest) * 0x1p112f;
  const uint32_t special = rest | 0x7f800000u;
  return as_float((rest >= 0x0f800000u ? special : as_bits(finite)) | sign);
#endif
}

template <class T>
struct from_float;

template <>
struct from_float<bf16> {
  RULE_FN bf16 convert(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return {bits};
#else
    const uint32_t u = as_bits(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {uint16_t(x == x ? rounded : 0x7fffu)};
#endif
  }
};

template <>
struct from_float<f16> {
  RULE_FN f16 convert(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return {bits};
#else
    const uint32_t u = as_bits(x), magnitude = u & 0x7fffffffu;
    // below 2^-14 the addition of 0.5 lets the adder round at fp16's subnormal spacing of 2^-24
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7fffu : 0x7c00u;
    // 65520 is the first value that rounds to infinity
    const uint32_t rounded = magnitude >= 0x477ff000u  ? special
                             : magnitude < 0x38800000u ? subnormal
                                                       : normal;
    return {uint16_t(rounded | ((u >> 16) & 0x8000u))};
#endif
  }
};

}  // namespace danlu
