// Sums over the threads of a block, in an order that never changes.
#pragma once
#include "runtime.h"

namespace danlu {

constexpr int warp_size = 32;

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int distance = warp_size / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Of each of n numbers over a block of so many threads, in thread 0.
template <int threads, int n>
__device__ __forceinline__ void block_sums(double (&x)[n]) {
  constexpr int warps = threads / warp_size;
  SHARED_ARRAY(double, partial, n* warps);
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
#pragma unroll
  for (int j = 0; j < n; j++) {
    x[j] = warp_sum(x[j]);
    if (lane == 0) partial[j * warps + warp] = x[j];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int j = 0; j < n; j++) {
      x[j] = partial[j * warps];
      for (int i = 1; i < warps; i++) x[j] += partial[j * warps + i];
    }
  }
}

}  // namespace danlu
