#include "stream.h"

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
__global__ void __launch_bounds__(threads) stream_kernel(const Arrays __grid_constant__ a) {
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

}  // namespace

void stream(const std::vector<uintptr_t>& written, uintptr_t read, int64_t size, int device,
            uintptr_t cuda_stream) {
  if (written.empty() || written.size() > 3) throw std::invalid_argument("stream writes 1 to 3 arrays");
  Arrays arrays = {};
  for (size_t i = 0; i < written.size(); i++) arrays.written[i] = reinterpret_cast<float*>(written[i]);
  arrays.read = reinterpret_cast<const float*>(read);
  arrays.size = size;
  if (size <= 0) return;
  const int64_t packs = (size + Pack<float>::size - 1) / Pack<float>::size;
  const DeviceGuard guard(device);
  void* arguments[] = {&arrays};
  const decltype(&stream_kernel<1>) kernels[] = {stream_kernel<1>, stream_kernel<2>, stream_kernel<3>};
  check(cudaLaunchKernel(kernels[written.size() - 1], dim3(unsigned((packs + threads - 1) / threads)),
                         dim3(threads), arguments, 0, reinterpret_cast<cudaStream_t>(cuda_stream)),
        "the stream kernel could not be launched");
}

}  // namespace danlu
