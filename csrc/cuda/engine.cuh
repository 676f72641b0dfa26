// The element-wise step on a GPU: a block for each chunk of a tensor, any number of tensors in a launch.
// Knows no optimizer.
#pragma once
#include "combinations.cuh"
#include "elements.cuh"
#include "kernels.h"

namespace danlu {

using DANLU_ISA::Arrays;
using DANLU_ISA::Elements;

// How the work is cut; docs/cuda_engine.md says what was tried.
template <int threads_, int elements_, int min_blocks_, int chunk_size_>
struct Shape {
  static constexpr int threads = threads_;        // of a block
  static constexpr int elements = elements_;      // of a thread and turn of the loop
  static constexpr int min_blocks = min_blocks_;  // resident on a multiprocessor, which bounds the registers
  static constexpr int chunk_size = chunk_size_;  // elements of a block
  static_assert(chunk_size <= 65536, "the size of a last chunk has 16 bits");
};

using DefaultShape = Shape<256, 8, 4, 16384>;

// Of a chunk of a tensor.
template <class Rule, class F, class List>
__device__ __forceinline__ Arrays<Rule, F> arrays_of(const List& list, const Chunk& chunk) {
  const auto address = [&](auto a) {
    constexpr int word = F::template word<a.value, a.array, F::num_values>;
    return reinterpret_cast<void*>(list.template word<record_words<F>>(chunk.tensor, word));
  };
  int64_t first = chunk.offset;
  if constexpr (F::indexed) first += list.template word<record_words<F>>(chunk.tensor, record_words<F> - 2);
  return Arrays<Rule, F>(address, chunk.offset, first);
}

template <class Rule, class List>
__device__ __forceinline__ Coefficients<Rule> load_coefficients(const List& list, int set) {
  if (list.device_coefficients)
    return coefficients_at<Rule>(list.device_coefficients + int64_t(set) * list.stride, list.clip);
  return coefficients_at<Rule>(list.host_coefficients(set), list.clip);
}

template <class Rule, class F, class S, class List>
__global__ void __launch_bounds__(S::threads, S::min_blocks) apply_kernel(const List __grid_constant__ list) {
  if (list.found_inf && *list.found_inf != 0.f) return;
  const Chunk chunk = find_chunk<record_words<F>>(list, blockIdx.x, gridDim.x, S::chunk_size);
  const Arrays<Rule, F> arrays = arrays_of<Rule, F>(list, chunk);
  const Coefficients<Rule> coefficients = load_coefficients<Rule>(list, chunk.set);
  const bool store_params = coefficients.header.store_params != 0.f;

  // Neighbouring threads take neighbouring packs.
  constexpr int width = S::elements < Arrays<Rule, F>::width ? S::elements : Arrays<Rule, F>::width;
  constexpr int packs = S::elements / width;
  constexpr int stride = S::threads * width;
  int vector_end = arrays.aligned() ? chunk.size / width * width : 0;
  settled(vector_end);
#pragma unroll 1
  for (int first = threadIdx.x * width; first < vector_end; first += packs * stride) {
    Elements<Rule, width> e[packs];
#pragma unroll
    for (int i = 0; i < packs; i++)
      if (first + i * stride < vector_end) e[i].load_all(arrays, first + i * stride);
#pragma unroll
    for (int i = 0; i < packs; i++) {
      if (first + i * stride >= vector_end) break;
      e[i].update(coefficients);
      e[i].store_all(arrays, first + i * stride, store_params);
    }
  }
#pragma unroll 1
  for (int at = vector_end + threadIdx.x; at < chunk.size; at += S::threads) {
    Elements<Rule, 1> e;
    e.load_all(arrays, at);
    e.update(coefficients);
    e.store_all(arrays, at, store_params);
  }
}

// Enqueues one launch and tells at once whether it could be.
template <class Rule, class F, class S = DefaultShape>
cudaError_t launch(LaunchPacker& packer, cudaStream_t stream) {
  return packer.launch([&](auto& list, unsigned blocks) {
    void* arguments[] = {&list};
    return cudaLaunchKernel(apply_kernel<Rule, F, S, std::decay_t<decltype(list)>>, dim3(blocks),
                            dim3(S::threads), arguments, 0, stream);
  });
}

namespace DANLU_ISA {

template <class Rule>
CudaRule describe(const char* name) {
  CudaRule rule = {rule_info<Rule>(name), DefaultShape::chunk_size, {}};
  for_each_combination<Rule, Bf16>([&](auto formats) {
    using F = typename decltype(formats)::type;
    rule.kernels.push_back({formats_of(F()), launch<Rule, F>});
  });
  return rule;
}

}  // namespace DANLU_ISA
}  // namespace danlu
