#include "kernels.h"

#include "../cuda/storage.cuh"

namespace emulator {
namespace {

// Every thread ends with its block's sum: shuffles within a warp, shared memory between them.
__global__ void sum_kernel(const double* values, int count, double* sums) {
  SHARED_ARRAY(double, partial, 32);
  const int at = blockIdx.x * blockDim.x + threadIdx.x;
  double sum = at < count ? values[at] : 0;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; warp++) sum += partial[warp];
  sums[at] = __shfl_sync(~0u, sum, 0);
}

__global__ void transpose_kernel(const float* from, float* to) {
  SHARED_ARRAY(float, tile, 1024);
  const unsigned size = blockDim.x;
  tile[threadIdx.y * size + threadIdx.x] = from[threadIdx.y * size + threadIdx.x];
  __syncthreads();
  to[threadIdx.y * size + threadIdx.x] = tile[threadIdx.x * size + threadIdx.y];
}

__global__ void torn_kernel(int threads) {
  if (int(threadIdx.x) < threads) __syncthreads();
}

__global__ void torn_shuffle_kernel() {
  if (threadIdx.x < 16)
    __shfl_xor_sync(~0u, 1.0, 16);
  else
    __shfl_xor_sync(~0u, 2.0, 16);
}

__global__ void misaligned_kernel(const float* values) {
  float loaded[4];
  danlu::load_packs(values + 1, loaded);
}

__global__ void set_kernel(float* value) { *value = 1.f; }

__global__ void read_kernel(const float* value, float* read) {
  read[0] = *value;
  wait_for_launch_before();
  read[1] = *value;
}

__global__ void nothing_kernel() {}

template <class... A, class... B>
void launch_early(void (*kernel)(A...), B... arguments) {
  cudaLaunchAttribute early = {cudaLaunchAttributeProgrammaticStreamSerialization, {1}};
  const cudaLaunchConfig_t config = {dim3(1), dim3(1), nullptr, &early, 1};
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

std::vector<double> block_sums(const std::vector<double>& values, unsigned threads) {
  int count = int(values.size());
  const unsigned blocks = (count + threads - 1) / threads;
  std::vector<double> sums(size_t(blocks) * threads);
  const double* from = values.data();
  double* to = sums.data();
  void* arguments[] = {&from, &count, &to};
  cudaLaunchKernel(sum_kernel, dim3(blocks), dim3(threads), arguments, 0, nullptr);
  return sums;
}

std::vector<float> transposed(const std::vector<float>& matrix, unsigned size) {
  std::vector<float> result(matrix.size());
  const float* from = matrix.data();
  float* to = result.data();
  void* arguments[] = {&from, &to};
  cudaLaunchKernel(transpose_kernel, dim3(1), dim3(size, size), arguments, 0, nullptr);
  return result;
}

void torn_barrier() {
  int threads = 32;
  void* arguments[] = {&threads};
  cudaLaunchKernel(torn_kernel, dim3(1), dim3(64), arguments, 0, nullptr);
}

void torn_shuffle() { cudaLaunchKernel(torn_shuffle_kernel, dim3(1), dim3(32), nullptr, 0, nullptr); }

void misaligned() {
  alignas(16) float values[8] = {};
  const float* from = values;
  void* arguments[] = {&from};
  cudaLaunchKernel(misaligned_kernel, dim3(1), dim3(1), arguments, 0, nullptr);
}

std::pair<float, float> overlapping() {
  float value = 0.f, read[2] = {};
  float* to = &value;
  void* arguments[] = {&to};
  cudaLaunchKernel(set_kernel, dim3(1), dim3(1), arguments, 0, nullptr);
  launch_early(read_kernel, static_cast<const float*>(&value), static_cast<float*>(read));
  finish();
  return {read[0], read[1]};
}

void impatient() { launch_early(nothing_kernel); }

}  // namespace emulator
