#include "sum_parts.h"

#include <algorithm>

#include "device.h"
#include "storage.cuh"

namespace danlu {
namespace {

constexpr int sum_threads = 256;

struct Stop {
  const Summation* summations;
  const int32_t *of_block, *indices;
  double* scratch;
  const int64_t* addresses;
  int32_t num_tensors, row_of_coefficients;
};

// Every `groups`th part of a sum, from a group's first on. A thread counts its place on, without a division.
struct Walk {
  int64_t place, at;  // of the part, which one it is of its row
  int64_t step, ahead, wrapped;
};

__device__ __forceinline__ Walk walk(const Summation& s, int group, int groups) {
  // parts beyond those of a turn make no difference
  const int parts = int(s.parts < 1 ? 1 : s.parts > sum_threads ? sum_threads + 1 : s.parts);
  Walk w;
  w.at = group % parts;
  w.place = w.at * s.stride + group / parts * s.times_stride;
  w.step = groups % parts;
  w.ahead = w.step * s.stride + groups / parts * s.times_stride;
  w.wrapped = s.times_stride - s.parts * s.stride;
  return w;
}

template <class T>
__device__ __forceinline__ double sum_of_group(const T* parts, const Summation& s, Walk w, int group,
                                               int groups) {
  constexpr int ahead = 8;  // parts that are loaded before the first is added
  const T* const first = parts + w.place;
  double sum = 0;
#pragma unroll 1
  for (int64_t left = s.parts * s.times - group; left > 0; left -= ahead * groups) {
    double x[ahead];
#pragma unroll
    for (int i = 0; i < ahead; i++) {
      // behind the last the first again, for nothing: a condition would keep loads from one another
      const bool there = i * groups < left;
      const double part = double(load(there ? parts + w.place : first));
      x[i] = there ? part : 0.0;
      w.at += w.step;
      w.place += w.ahead;
      if (w.at >= s.parts) {
        w.at -= s.parts;
        w.place += w.wrapped;
      }
    }
#pragma unroll
    for (int i = 0; i < ahead; i++) sum += x[i];
  }
  return sum;
}

// The first state of a tensor; null without a gradient, where there may be none.
__device__ __forceinline__ const float* averages_of(const Stop& stop, int64_t tensor) {
  const int64_t tensors = stop.num_tensors;
  if (stop.addresses[stop.row_of_coefficients * tensors + tensor] < 0) return nullptr;
  return global(reinterpret_cast<const float*>(stop.addresses[2 * tensors + tensor]));
}

// A block has some neighbouring sums at once. A group of its threads has one for each of them, and groups
// share the parts. Without the bound on blocks ptxas stops at 64 registers, and adds a part before it loads
// the next.
__global__ void __launch_bounds__(sum_threads, 2) sum_parts_kernel(const Stop __grid_constant__ stop) {
  SHARED_ARRAY(double, partial, sum_threads);
  const Summation s = stop.summations[stop.of_block[blockIdx.x]];
  const int together = int(s.together), groups = sum_threads / together;
  const int group = int(threadIdx.x) / together;
  const int64_t at = int64_t(stop.indices[blockIdx.x]) * together + int(threadIdx.x) % together;
  double sum = 0;
  if (at < s.sums) {
    const int64_t place = s.first + at / s.run * s.run_stride + at % s.run;
    const Walk parts = walk(s, group, groups);
    if (s.tensor < 0)
      sum = sum_of_group(stop.scratch + place, s, parts, group, groups);
    else if (const float* averages = averages_of(stop, s.tensor))
      sum = sum_of_group(averages + place, s, parts, group, groups);
  }
  partial[threadIdx.x] = sum;
  for (int half = groups / 2; half > 0; half /= 2) {
    __syncthreads();
    if (group < half) partial[threadIdx.x] += partial[threadIdx.x + half * together];
  }
  if (group == 0 && at < s.sums) store(stop.scratch + s.to + at, partial[threadIdx.x]);
}

}  // namespace

void sum_parts(const std::string& name, int device, uintptr_t cuda_stream, uintptr_t summations,
               uintptr_t places, int64_t blocks, uintptr_t scratch, uintptr_t addresses, int num_tensors,
               int num_formats) {
  if (blocks <= 0) return;
  const DeviceGuard guard(std::max(device, 0));
  const int32_t* of_block = reinterpret_cast<const int32_t*>(places);
  Stop stop = {reinterpret_cast<const Summation*>(summations),
               of_block,
               of_block + blocks,
               reinterpret_cast<double*>(scratch),
               reinterpret_cast<const int64_t*>(addresses),
               num_tensors,
               num_formats};
  void* arguments[] = {&stop};
  const cudaError_t error = cudaLaunchKernel(sum_parts_kernel, dim3(unsigned(blocks)), dim3(sum_threads),
                                             arguments, 0, reinterpret_cast<cudaStream_t>(cuda_stream));
  check_launch(error, name, 0);
}

}  // namespace danlu
