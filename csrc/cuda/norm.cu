#include "norm.h"

#include "../common/rule.h"
#include "storage.cuh"
#include "sums.cuh"

namespace danlu {
namespace {

using namespace DANLU_ISA;

constexpr int squares_threads = 256, norm_threads = 1024;
constexpr int record_words = words_of_record(2, false);  // sums and gradient

// In float64, where the square of an fp32 number is exact.
template <int n>
__device__ __forceinline__ void add_squares(const float (&x)[n], double& sum) {
#pragma unroll
  for (int i = 0; i < n; i++) sum = fma(double(x[i]), double(x[i]), sum);
}

template <class G, class List>
__global__ void __launch_bounds__(squares_threads) squares_kernel(const List __grid_constant__ list) {
  constexpr int width = Pack<G>::size, stride = squares_threads * width;
  constexpr int together = 4;  // packs that are loaded before the first is used
  const Chunk chunk = find_chunk<record_words>(list, blockIdx.x, gridDim.x, norm_chunk);
  const G* const g =
      reinterpret_cast<const G*>(list.template word<record_words>(chunk.tensor, 1)) + chunk.offset;
  const bool aligned = reinterpret_cast<uintptr_t>(g) % pack_bytes == 0;
  const int vector_end = aligned ? chunk.size / width * width : 0;
  double total[1] = {};
#pragma unroll 1
  for (int first = threadIdx.x * width; first < vector_end; first += together * stride) {
    float x[together][width] = {};
#pragma unroll
    for (int i = 0; i < together; i++)
      if (first + i * stride < vector_end) load_packs(g + first + i * stride, x[i]);
#pragma unroll
    for (int i = 0; i < together; i++) add_squares(x[i], total[0]);
  }
#pragma unroll 1
  for (int at = vector_end + threadIdx.x; at < chunk.size; at += squares_threads) {
    const float x[1] = {load(g + at)};
    add_squares(x, total[0]);
  }
  block_sums<squares_threads>(total);
  if (threadIdx.x > 0) return;
  store(reinterpret_cast<double*>(list.template word<record_words>(chunk.tensor, 0)) +
            chunk.offset / norm_chunk,
        total[0]);
}

__global__ void __launch_bounds__(norm_threads)
    norm_kernel(const double* const sums, const int64_t count, const double max_norm,
                const float* const grad_scale, Norm* const norm) {
  double total[1] = {};
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += norm_threads) total[0] += load(sums + i);
  block_sums<norm_threads>(total);
  if (threadIdx.x > 0) return;
  const double factor = grad_scale ? 1.0 / double(*grad_scale) : 1.0;
  norm->squares = total[0];
  norm->factor = float(factor / larger(square_root(total[0]) * factor / max_norm, 1.0));
}

}  // namespace

cudaError_t launch_squares(Format format, LaunchPacker& packer, cudaStream_t stream) {
  return packer.launch([&](auto& list, unsigned blocks) {
    using List = std::decay_t<decltype(list)>;
    void* arguments[] = {&list};
    cudaError_t error = cudaSuccess;
    visit_format(format, TorchFormats(), [&](auto tag) {
      const auto kernel = squares_kernel<Element<typename decltype(tag)::type>, List>;
      error = cudaLaunchKernel(kernel, dim3(blocks), dim3(squares_threads), arguments, 0, stream);
    });
    return error;
  });
}

cudaError_t launch_norm(const double* sums, int64_t count, double max_norm, const float* grad_scale,
                        Norm* norm, cudaStream_t stream) {
  void* arguments[] = {&sums, &count, &max_norm, &grad_scale, &norm};
  return cudaLaunchKernel(norm_kernel, dim3(1), dim3(norm_threads), arguments, 0, stream);
}

}  // namespace danlu
