// Sums of squares in float64, where the square of an fp32 number is exact: the same bits for every
// instruction set, since each of 32 partial sums takes every 32nd element whatever the width of the machine's
// vectors.
#pragma once
#include <cstdint>

#include "../tensor_list.h"

namespace danlu {
namespace sum_squares_detail {

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_ISA
#endif

typedef float Floats __attribute__((vector_size(32), aligned(4)));
typedef double Doubles __attribute__((vector_size(64)));
constexpr int64_t width = 8, lanes = 32;

FOR_EACH_ISA static double of_floats(const float* x, int64_t n) {
  Doubles sums[lanes / width] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int j = 0; j < lanes / width; j++) {
      const Doubles v = __builtin_convertvector(*reinterpret_cast<const Floats*>(x + i + j * width), Doubles);
      sums[j] += v * v;
    }
  for (int j = 0; i < n; i++, j++) sums[j / width][j % width] += double(x[i]) * double(x[i]);
  double total = 0;
  for (int j = 0; j < lanes; j++) total += sums[j / width][j % width];
  return total;
}
FOR_EACH_ISA static void widen(const bf16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}

FOR_EACH_ISA static void widen(const f16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}
#undef FOR_EACH_ISA

template <class T>
double of_narrow(const T* x, int64_t n) {
  constexpr int64_t block = 1024;  // 4 KB of fp32 stay in the first-level cache
  float wide[block];
  double total = 0;
  for (int64_t at = 0; at < n; at += block) {
    const int64_t count = n - at < block ? n - at : block;
    widen(x + at, wide, count);
    total += of_floats(wide, count);
  }
  return total;
}

}  // namespace sum_squares_detail

// Of elements [begin, end).
inline double sum_squares(Storage x, int64_t begin, int64_t end) {
  using namespace sum_squares_detail;
  switch (x.dtype) {
    case Dtype::f32:
      return of_floats(static_cast<const float*>(x.data) + begin, end - begin);
    case Dtype::bf16:
      return of_narrow(static_cast<const bf16*>(x.data) + begin, end - begin);
    case Dtype::f16:
      return of_narrow(static_cast<const f16*>(x.data) + begin, end - begin);
  }
  return 0;
}

}  // namespace danlu
