// The element-wise step on a GPU: a block for each chunk of a tensor, any number of tensors in a launch.
// Knows no optimizer.
#pragma once
#include "../common/rule_traits.h"
#include "formats.cuh"
#include "kernels.h"

namespace danlu {

using DANLU_ISA::outcome;
using DANLU_ISA::Outcome;
using DANLU_ISA::Uses;
using DANLU_ISA::UsesOf;

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

// The part of a tensor that one block updates.
template <class Rule, class F>
struct Span {
  static constexpr bool second_moment = Rule::num_states > 1;
  static constexpr Uses uses = UsesOf<Rule>::value;

  typename F::P* p;
  const typename F::G* g;
  typename F::M* m;
  float* v;  // only with a second moment
  int size;

  static constexpr int width =
      pack_width({sizeof(typename F::M), uses.parameter ? sizeof(typename F::P) : 1,
                  uses.gradient ? sizeof(typename F::G) : 1, second_moment ? sizeof(float) : 1});

  __device__ __forceinline__ bool aligned() const {
    uintptr_t bits = reinterpret_cast<uintptr_t>(m);
    if constexpr (uses.parameter) bits |= reinterpret_cast<uintptr_t>(p);
    if constexpr (uses.gradient) bits |= reinterpret_cast<uintptr_t>(g);
    if constexpr (second_moment) bits |= reinterpret_cast<uintptr_t>(v);
    return bits % pack_bytes == 0;
  }
};

// n elements of a span in registers.
template <class Rule, int n>
struct Elements {
  static constexpr bool second_moment = Rule::num_states > 1;
  static constexpr Uses uses = UsesOf<Rule>::value;

  float p[n], g[n], m[n], v[second_moment ? n : 1];

  template <class F>
  __device__ __forceinline__ void load_all(const Span<Rule, F>& s, int at) {
    if constexpr (uses.parameter) load_values(s.p + at, p);
    if constexpr (uses.gradient) load_values(s.g + at, g);
    if constexpr (!uses.parameter || !uses.gradient) clear_unused();
    load_values(s.m + at, m);
    if constexpr (second_moment) load_values(s.v + at, v);
  }

  template <class F>
  __device__ __forceinline__ void store_all(const Span<Rule, F>& s, int at, bool store_params) const {
    if (uses.outcome != Outcome::none && store_params) store_values(s.p + at, p);
    store_values(s.m + at, m);
    if constexpr (second_moment) store_values(s.v + at, v);
  }

  __device__ __forceinline__ void update(int j, const Coefficients<Rule>& coefficients) {
    float s[Rule::num_states];
    s[0] = m[j];
    if constexpr (second_moment) s[1] = v[j];
    p[j] = outcome<Rule>(p[j], Rule::step(p[j], coefficients.header.factor * g[j], s, coefficients.k));
    m[j] = s[0];
    if constexpr (second_moment) v[j] = s[1];
  }

 private:
  __device__ __forceinline__ void clear_unused() {
#pragma unroll
    for (int j = 0; j < n; j++) {
      if constexpr (!uses.parameter) p[j] = 0.f;
      if constexpr (!uses.gradient) g[j] = 0.f;
    }
  }
};

template <class Rule, class F, class List>
__device__ __forceinline__ Span<Rule, F> span_of(const List& list, const Chunk& chunk) {
  constexpr int states = Rule::num_states;
  const auto pointer = [&](int which) { return list.template pointer<states>(chunk.tensor, which); };
  Span<Rule, F> span;
  span.p = reinterpret_cast<typename F::P*>(pointer(0)) + chunk.offset;
  span.g = reinterpret_cast<const typename F::G*>(pointer(1)) + chunk.offset;
  span.m = reinterpret_cast<typename F::M*>(pointer(2)) + chunk.offset;
  if constexpr (states > 1) span.v = reinterpret_cast<float*>(pointer(3)) + chunk.offset;
  span.size = chunk.size;
  settled(span.p), settled(span.g), settled(span.m);
  if constexpr (states > 1) settled(span.v);
  return span;
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
  const Chunk chunk = find_chunk<Rule::num_states>(list, blockIdx.x, gridDim.x, S::chunk_size);
  const Span<Rule, F> span = span_of<Rule, F>(list, chunk);
  const Coefficients<Rule> coefficients = load_coefficients<Rule>(list, chunk.set);
  const bool store_params = coefficients.header.store_params != 0.f;

  // Neighbouring threads take neighbouring packs.
  constexpr int width = S::elements < Span<Rule, F>::width ? S::elements : Span<Rule, F>::width;
  constexpr int packs = S::elements / width;
  constexpr int stride = S::threads * width;
  int vector_end = span.aligned() ? span.size / width * width : 0;
  settled(vector_end);
#pragma unroll 1
  for (int first = threadIdx.x * width; first < vector_end; first += packs * stride) {
    Elements<Rule, width> e[packs];
#pragma unroll
    for (int i = 0; i < packs; i++)
      if (first + i * stride < vector_end) e[i].load_all(span, first + i * stride);
#pragma unroll
    for (int i = 0; i < packs; i++) {
      if (first + i * stride >= vector_end) break;
#pragma unroll
      for (int j = 0; j < width; j++) e[i].update(j, coefficients);
      e[i].store_all(span, first + i * stride, store_params);
    }
  }
#pragma unroll 1
  for (int at = vector_end + threadIdx.x; at < span.size; at += S::threads) {
    Elements<Rule, 1> e;
    e.load_all(span, at);
    e.update(0, coefficients);
    e.store_all(span, at, store_params);
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

template <class Rule, class... F>
CudaRule describe_for(const char* name) {
  return {rule_info<Rule>(name),
          DefaultShape::chunk_size,
          {{dtype_of<typename F::P>, dtype_of<typename F::G>, dtype_of<typename F::M>, launch<Rule, F>}...}};
}

template <class Rule>
CudaRule describe(const char* name) {
  return describe_for<Rule,                          //
                      Formats<float, float, float>,  //
                      Formats<bf16, bf16, float>,    //
                      Formats<bf16, float, float>,   //
                      Formats<bf16, bf16, bf16>,     //
                      Formats<f16, f16, float>,      //
                      Formats<f16, float, float>,    //
                      Formats<float, bf16, float>,   //
                      Formats<float, float, bf16>>(name);
}

}  // namespace DANLU_ISA
}  // namespace danlu
