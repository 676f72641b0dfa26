#include "bandwidth_ceiling.h"

#include <stdexcept>

#include "device.h"
#include "storage.cuh"

namespace danlu {
namespace {

constexpr int threads = 256;

struct Arrays {
  float* written[3];
  const float* read;
  int64_t size;
};

// A pack of every array for each thread, and a value for those behind the last whole pack.
template <int num_written>
__global__ void __launch_bounds__(threads) ceiling_kernel(const Arrays __grid_constant__ a) {
  constexpr int width = Pack<float>::size;
  const int64_t thread = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (thread < a.size / width) {
    float g[width], values[num_written][width];
    load_packs(a.read + thread * width, g);
#pragma unroll
    for (int i = 0; i < num_written; i++) load_packs(a.written[i] + thread * width, values[i]);
#pragma unroll
    for (int i = 0; i < num_written; i++) {
#pragma unroll
      for (int j = 0; j < width; j++) values[i][j] += g[j];
      store_packs(a.written[i] + thread * width, values[i]);
    }
  }
  const int64_t at = a.size / width * width + thread;
  if (thread < width && at < a.size)
    for (int i = 0; i < num_written; i++) a.written[i][at] += a.read[at];
}

constexpr int together = 4;  // packs that a thread has in flight
constexpr int read_by_block = threads * Pack<float>::size * together;

// The condition makes every value count; a store that comes to pass would say that there was a NaN.
__global__ void __launch_bounds__(threads) read_kernel(float* const x, const int64_t size) {
  constexpr int width = Pack<float>::size;
  const int64_t first = int64_t(blockIdx.x) * read_by_block + threadIdx.x * width;
  float values[together][width] = {};
#pragma unroll
  for (int i = 0; i < together; i++) {
    const int64_t at = first + i * threads * width;
    if (at + width <= size) load_packs(x + at, values[i]);
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < together; i++) {
#pragma unroll
    for (int j = 0; j < width; j++) sum += values[i][j];
  }
  const int64_t rest = size / width * width + threadIdx.x;
  if (blockIdx.x == 0 && rest < size) sum += load(x + rest);
  if (sum != sum) store(x, sum);
}

}  // namespace

void bandwidth_ceiling(const std::vector<uintptr_t>& written, uintptr_t read, int64_t size, int device,
                       uintptr_t cuda_stream) {
  if (written.empty() || written.size() > 3)
    throw std::invalid_argument("bandwidth_ceiling writes 1 to 3 arrays");
  Arrays arrays = {};
  for (size_t i = 0; i < written.size(); i++) arrays.written[i] = reinterpret_cast<float*>(written[i]);
  arrays.read = reinterpret_cast<const float*>(read);
  arrays.size = size;
  if (size <= 0) return;
  const int64_t packs = (size + Pack<float>::size - 1) / Pack<float>::size;
  const DeviceGuard guard(device);
  void* arguments[] = {&arrays};
  const decltype(&ceiling_kernel<1>) kernels[] = {ceiling_kernel<1>, ceiling_kernel<2>, ceiling_kernel<3>};
  check(cudaLaunchKernel(kernels[written.size() - 1], dim3(unsigned((packs + threads - 1) / threads)),
                         dim3(threads), arguments, 0, reinterpret_cast<cudaStream_t>(cuda_stream)),
        "the kernel of the bandwidth ceiling could not be launched");
}

void read_through(uintptr_t address, int64_t size, int device, uintptr_t cuda_stream) {
  if (size <= 0) return;
  float* values = reinterpret_cast<float*>(address);
  const DeviceGuard guard(device);
  void* arguments[] = {&values, &size};
  check(cudaLaunchKernel(read_kernel, dim3(unsigned((size + read_by_block - 1) / read_by_block)),
                         dim3(threads), arguments, 0, reinterpret_cast<cudaStream_t>(cuda_stream)),
        "the reading kernel could not be launched");
}

}  // namespace danlu
