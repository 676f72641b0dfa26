// How the shapes of the CUDA engine compare: every one over a large tensor and over the tensors of a GPT-2.
//
//     nvcc -std=c++17 -O3 -fmad=false -arch=sm_90 -I csrc bench/tune.cu -o tune && ./tune
//
// Prints a line of JSON for each rule, storage formats, shape and workload. ms is the median of two passes of
// ten launches, the second pass over the shapes in reverse order; the passes stand beside it, so that a
// difference between shapes can be told from noise. same_bits: the first step gives the bits of DefaultShape.
#define DANLU_ISA cuda
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/engine.cuh"
#include "rules/adam.h"
#include "rules/lion.h"

using namespace danlu;

namespace {

#define CHECK(call)                                                                                   \
  do {                                                                                                \
    const cudaError_t error_ = (call);                                                                \
    if (error_ != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (0)

constexpr int64_t largest = int64_t{1} << 28;
constexpr int launches = 10;

struct Workload {
  const char* name;
  std::vector<int64_t> sizes;
};

std::vector<Workload> workloads() {
  const int64_t width = 768;
  std::vector<int64_t> gpt2 = {50257 * width, 1024 * width};
  for (int block = 0; block < 12; block++)
    for (const int64_t size : {width, width, 3 * width * width, 3 * width, width * width, width, width, width,
                               4 * width * width, 4 * width, 4 * width * width, width})
      gpt2.push_back(size);
  gpt2.insert(gpt2.end(), {width, width});
  return {{"one-tensor", {largest}}, {"gpt2-small", gpt2}};
}

// What the arrays of parameter (0), gradient and first moment have.
template <class F, int value>
using ElementOf = Element<typename F::template Value<value>>;

// Parameter, gradient and states, each large enough for the largest workload in fp32.
struct Memory {
  void *p, *g, *m;
  float* v;
  unsigned long long* sum;

  Memory() {
    CHECK(cudaMalloc(&p, largest * sizeof(float)));
    CHECK(cudaMalloc(&g, largest * sizeof(float)));
    CHECK(cudaMalloc(&m, largest * sizeof(float)));
    CHECK(cudaMalloc(&v, largest * sizeof(float)));
    CHECK(cudaMalloc(&sum, sizeof *sum));
  }
  ~Memory() {
    for (void* memory : {p, g, m, static_cast<void*>(v), static_cast<void*>(sum)}) cudaFree(memory);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

__device__ uint32_t scrambled(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Values in [low, 1), scaled.
template <class T>
__global__ void fill_kernel(T* to, uint32_t seed, float low, float scale) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < largest; i += stride) {
    const float uniform = float(scrambled(uint32_t(i) + seed) >> 8) * 0x1p-24f;
    store(to + i, scale * (low + (1.f - low) * uniform));
  }
}

template <class T>
__global__ void sum_kernel(const T* from, unsigned long long* sum) {
  unsigned long long mine = 0;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < largest; i += stride)
    mine += uint64_t(scrambled(uint32_t(i)) | 1) * as_bits(load(from + i));
  atomicAdd(sum, mine);
}

template <class T>
void fill(T* to, uint32_t seed, float low, float scale) {
  fill_kernel<<<1024, 256>>>(to, seed, low, scale);
  CHECK(cudaGetLastError());
}

template <class F>
void fill_all(const Memory& memory) {
  fill(static_cast<ElementOf<F, 0>*>(memory.p), 1u, -1.f, 2e-2f);
  fill(static_cast<ElementOf<F, 1>*>(memory.g), 2u, -1.f, 1e-3f);
  fill(static_cast<ElementOf<F, 2>*>(memory.m), 3u, -1.f, 1e-4f);
  fill(memory.v, 4u, 0.f, 1e-7f);
}

// Of the bits of everything that a step writes; weighted, so that exchanged values show.
template <class F>
unsigned long long checksum(const Memory& memory) {
  unsigned long long sum = 0;
  CHECK(cudaMemset(memory.sum, 0, sizeof sum));
  sum_kernel<<<1024, 256>>>(static_cast<const ElementOf<F, 0>*>(memory.p), memory.sum);
  sum_kernel<<<1024, 256>>>(static_cast<const ElementOf<F, 2>*>(memory.m), memory.sum);
  sum_kernel<<<1024, 256>>>(memory.v, memory.sum);
  CHECK(cudaGetLastError());
  CHECK(cudaMemcpy(&sum, memory.sum, sizeof sum, cudaMemcpyDeviceToHost));
  return sum;
}

template <class Rule>
std::vector<float> coefficients();
template <>
std::vector<float> coefficients<cuda::Lion>() {
  return {1.f, 1.f, 0.9f, 0.1f, 0.99f, 0.01f, 1e-4f, 1e-5f};
}
template <>
std::vector<float> coefficients<cuda::AdamW>() {
  return {1.f, 1.f, 0.9f, 0.1f, 0.999f, 0.001f, 1e-3f, 1.f, 1e-8f, 1e-5f};
}

// All tensors of a workload, one behind the other in memory.
template <class Rule, class F>
LaunchPacker packed(const Memory& memory, const Workload& workload, int chunk_size) {
  const std::vector<float> own = coefficients<Rule>();
  static_assert(sizeof(Coefficients<Rule>) == sizeof(CoefficientsHeader) + sizeof(typename Rule::Coeffs));
  LaunchPacker packer(Rule::num_states, sizeof(Coefficients<Rule>) / sizeof(float), chunk_size, nullptr);
  packer.head().clip = packer.head().found_inf = nullptr;
  int64_t at = 0;
  for (const int64_t size : workload.sizes) {
    Tensor t = {};
    t.p.data[0] = static_cast<ElementOf<F, 0>*>(memory.p) + at;
    t.g.data[0] = static_cast<ElementOf<F, 1>*>(memory.g) + at;
    t.states[0].data[0] = static_cast<ElementOf<F, 2>*>(memory.m) + at;
    t.states[1].data[0] = memory.v + at;
    t.size = size;
    if (!packer.add(t, own.data())) {
      std::fprintf(stderr, "%s does not fit into a launch\n", workload.name);
      std::exit(1);
    }
    at += (size + 63) / 64 * 64;
  }
  return packer;
}

struct Variant {
  int threads, elements, min_blocks, chunk;
  Launcher launch;
  std::vector<float> passes[2];
  bool same_bits = true;
};

template <class Rule, class F, class... Shapes>
std::vector<Variant> variants() {
  return {Variant{Shapes::threads, Shapes::elements, Shapes::min_blocks, Shapes::chunk_size,
                  launch<Rule, F, Shapes>}...};
}

float median(std::vector<float> sample) {
  std::sort(sample.begin(), sample.end());
  return (sample[(sample.size() - 1) / 2] + sample[sample.size() / 2]) / 2;
}

// Milliseconds of launches that follow each other.
std::vector<float> timed(const Variant& variant, LaunchPacker& packer) {
  cudaEvent_t events[launches + 1];
  for (cudaEvent_t& event : events) CHECK(cudaEventCreate(&event));
  for (int i = 0; i < 2; i++) CHECK(variant.launch(packer, nullptr));
  CHECK(cudaEventRecord(events[0]));
  for (int i = 0; i < launches; i++) {
    CHECK(variant.launch(packer, nullptr));
    CHECK(cudaEventRecord(events[i + 1]));
  }
  CHECK(cudaDeviceSynchronize());
  std::vector<float> ms(launches);
  for (int i = 0; i < launches; i++) CHECK(cudaEventElapsedTime(&ms[i], events[i], events[i + 1]));
  for (const cudaEvent_t event : events) CHECK(cudaEventDestroy(event));
  return ms;
}

template <class Rule, class F, class... Shapes>
void compare(const char* rule, const char* formats, const Memory& memory) {
  constexpr int64_t moments = Rule::num_states > 1 ? 2 * sizeof(float) : 0;
  constexpr int64_t bytes =
      2 * sizeof(ElementOf<F, 0>) + sizeof(ElementOf<F, 1>) + 2 * sizeof(ElementOf<F, 2>) + moments;
  for (const Workload& workload : workloads()) {
    std::vector<Variant> all = variants<Rule, F, DefaultShape, Shapes...>();
    const auto first_step = [&](const Variant& variant) {
      fill_all<F>(memory);
      LaunchPacker packer = packed<Rule, F>(memory, workload, variant.chunk);
      CHECK(variant.launch(packer, nullptr));
      return checksum<F>(memory);
    };
    const unsigned long long expected = first_step(all[0]);
    for (Variant& variant : all) variant.same_bits = first_step(variant) == expected;
    for (int pass = 0; pass < 2; pass++) {
      for (Variant& variant : all) {
        LaunchPacker packer = packed<Rule, F>(memory, workload, variant.chunk);
        variant.passes[pass] = timed(variant, packer);
      }
      std::reverse(all.begin(), all.end());
    }
    int64_t elements = 0;
    for (const int64_t size : workload.sizes) elements += size;
    for (const Variant& v : all) {
      std::vector<float> both = v.passes[0];
      both.insert(both.end(), v.passes[1].begin(), v.passes[1].end());
      const float ms = median(both);
      std::printf("{\"rule\": \"%s\", \"formats\": \"%s\", \"threads\": %d, \"elements\": %d, ", rule,
                  formats, v.threads, v.elements);
      std::printf("\"min_blocks\": %d, \"chunk\": %d, \"workload\": \"%s\", ", v.min_blocks, v.chunk,
                  workload.name);
      std::printf("\"ms\": %.5f, \"ms_of_passes\": [%.5f, %.5f], \"gbps\": %.1f, \"same_bits\": %s}\n", ms,
                  median(v.passes[0]), median(v.passes[1]), double(bytes * elements) / ms * 1e-6,
                  v.same_bits ? "true" : "false");
    }
    std::fflush(stdout);
  }
}

template <class Rule>
using AllF32 = cuda::WithMoment<Rule, F32, F32, F32>;
template <class Rule>
using AllBf16 = cuda::WithMoment<Rule, Bf16, Bf16, Bf16>;

}  // namespace

int main() {
  const Memory memory;
  // threads, elements, min_blocks, chunk; with five blocks AdamW in bf16 spills, four elements are fp32's
  // only
#define SHAPES                                                                                            \
  Shape<256, 8, 4, 4096>, Shape<256, 8, 4, 8192>, Shape<256, 8, 4, 32768>, Shape<256, 8, 4, 65536>,       \
      Shape<128, 8, 8, 8192>, Shape<512, 8, 2, 16384>, Shape<256, 8, 3, 16384>, Shape<256, 16, 2, 16384>, \
      Shape<128, 16, 4, 16384>
#define FIVE_BLOCKS Shape<256, 8, 5, 16384>
#define FOUR_ELEMENTS Shape<256, 4, 4, 16384>, Shape<256, 4, 6, 8192>, Shape<512, 4, 3, 16384>
  compare<cuda::Lion, AllF32<cuda::Lion>, SHAPES, FIVE_BLOCKS, FOUR_ELEMENTS>("lion", "f32/f32/f32", memory);
  compare<cuda::AdamW, AllF32<cuda::AdamW>, SHAPES, FIVE_BLOCKS, FOUR_ELEMENTS>("adamw", "f32/f32/f32",
                                                                                memory);
  compare<cuda::Lion, AllBf16<cuda::Lion>, SHAPES, FIVE_BLOCKS>("lion", "bf16/bf16/bf16", memory);
  compare<cuda::AdamW, AllBf16<cuda::AdamW>, SHAPES>("adamw", "bf16/bf16/bf16", memory);
  return 0;
}
