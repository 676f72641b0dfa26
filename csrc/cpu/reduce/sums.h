// Sums over what lies next to each other, in a fixed order whatever the width of the machine's vectors.
#pragma once
#include "../../common/types.h"

namespace danlu {
namespace DANLU_ISA {

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef double Doubles __attribute__((vector_size(64)));
typedef float HalfFloats __attribute__((vector_size(32), aligned(4)));

static inline double lane_sum(const float* x, int64_t n) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; j++) sums[j] += *reinterpret_cast<const Floats*>(x + i + 16 * j);
  for (; i + 16 <= n; i += 16) sums[0] += *reinterpret_cast<const Floats*>(x + i);
  const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  const HalfFloats half = __builtin_shufflevector(sum, sum, 0, 1, 2, 3, 4, 5, 6, 7) +
                          __builtin_shufflevector(sum, sum, 8, 9, 10, 11, 12, 13, 14, 15);
  const HalfFloats quarter = half + __builtin_shufflevector(half, half, 4, 5, 6, 7, 0, 1, 2, 3);
  const HalfFloats eighth = quarter + __builtin_shufflevector(quarter, quarter, 2, 3, 0, 1, 6, 7, 4, 5);
  float rest = eighth[0] + eighth[1];
  for (; i < n; i++) rest += x[i];
  return rest;
}

static inline double wide_sum(const float* x, int64_t n) {
  Doubles sums[4] = {};
  const int64_t whole = n / 32 * 32;
  for (int64_t i = 0; i < whole; i += 32)
    for (int j = 0; j < 4; j++)
      sums[j] += __builtin_convertvector(*reinterpret_cast<const HalfFloats*>(x + i + 8 * j), Doubles);
  const Doubles sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double rest = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
  for (int64_t i = whole; i < n; i++) rest += double(x[i]);
  return rest;
}

// Sums of the columns of a small matrix.
static inline void add_rows(const float* __restrict x, int64_t rows, int64_t columns,
                            float* __restrict sums) {
  for (int64_t c = 0; c < columns; c++) sums[c] = x[c];
  for (int64_t r = 1; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) sums[c] += x[r * columns + c];
}

}  // namespace DANLU_ISA
}  // namespace danlu
