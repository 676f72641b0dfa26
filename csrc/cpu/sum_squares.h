// Sums of squares in float64, where the square of an fp32 number is exact: the same bits for every
// instruction set, since each of 64 partial sums takes the same elements whatever the width of the machine's
// vectors, and a fused multiply-add rounds once, as the addition alone does.
#pragma once
#include <cstdint>

#include "../common/tensor_list.h"
#include "for_each_isa.h"

namespace danlu {
namespace sum_squares_detail {

typedef float Floats __attribute__((vector_size(32), aligned(4)));
typedef double Doubles __attribute__((vector_size(64)));
constexpr int64_t width = 8, streams = 4, turn = 2 * width;

// Four parts at once: a core reads several streams faster than one.
FOR_EACH_ISA static double of_floats(const float* x, int64_t n) {
  Doubles sums[streams][2] = {};
  const int64_t part = n / streams / turn * turn;
  for (int64_t i = 0; i < part; i += turn)
    for (int j = 0; j < streams; j++)
      for (int k = 0; k < 2; k++) {
        const float* from = x + j * part + i + k * width;
        const Doubles v = __builtin_convertvector(*reinterpret_cast<const Floats*>(from), Doubles);
        sums[j][k] += v * v;
      }
  double total = 0;
  for (int64_t i = streams * part; i < n; i++) total += double(x[i]) * double(x[i]);
  for (int j = 0; j < streams; j++)
    for (int k = 0; k < 2; k++)
      for (int lane = 0; lane < width; lane++) total += sums[j][k][lane];
  return total;
}

FOR_EACH_ISA static void widen(const bf16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}

FOR_EACH_ISA static void widen(const f16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = to_float(from[i]);
}

inline double of(const float* x, int64_t n) { return of_floats(x, n); }

template <class T>
double of(const T* x, int64_t n) {
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

// Of elements [begin, end) of one of torch's formats.
inline double sum_squares(Storage x, int64_t begin, int64_t end) {
  double total = 0;
  visit_format(x.format, TorchFormats(), [&](auto tag) {
    using E = Element<typename decltype(tag)::type>;
    total = sum_squares_detail::of(static_cast<const E*>(x.data[0]) + begin, end - begin);
  });
  return total;
}

}  // namespace danlu
