// Asks a GPU what an indexed read of kernel parameters close to their 32 KB limit gives.
//
//     nvcc -std=c++17 -O3 -arch=sm_90 bench/probe_params.cu -o probe_params && ./probe_params
//
// On sm_90 parameters begin at c[0x0][0x210]. An indexed read has a signed 16-bit offset, so ptxas adds
// 0x10000 to the addresses from 0x8000 on. It leaves that out between parameter offsets 0x8000 - 0x210 and
// 0x8000, where the read is right only if the hardware wraps the address at 16 bits. danlu's launches end
// below: the answer changes nothing, it tells whether they would have had to.
//
// Prints one line of JSON. Exit status: 0 if it has an answer, 1 if a CUDA call failed.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr int FIRST = 0x8000 - 0x210;  // offset among the parameters
constexpr int LEAD = 16;               // bytes of the pointer and the index
constexpr int WORDS = (0x7ff8 - LEAD) / 4;
constexpr int THREADS = 32, READS = 4;

struct Parameters {
  uint32_t* out;
  int32_t stride, unused;
  uint32_t words[WORDS];
};
static_assert(offsetof(Parameters, words) == LEAD);

// The word at an offset among the parameters; what it holds says where it is.
constexpr uint32_t mark(int offset) { return 0xda000000u + offset; }

// Reads at constant distances from an index that is known at run time only.
template <int OFFSET>
__global__ void read_at(const __grid_constant__ Parameters parameters) {
  const uint32_t* from = parameters.words + (OFFSET - LEAD) / 4 + int(blockIdx.x) * parameters.stride;
  uint32_t got[READS];
#pragma unroll
  for (int i = 0; i < READS; i++) got[i] = from[i];
#pragma unroll
  for (int i = 0; i < READS; i++) parameters.out[(blockIdx.x * THREADS + threadIdx.x) * READS + i] = got[i];
}

bool ok(cudaError_t error) {
  if (error != cudaSuccess) std::printf("{\"error\": \"%s\"}\n", cudaGetErrorString(error));
  return error == cudaSuccess;
}

// Of the words from OFFSET on, how many are not what was passed; -1 if CUDA failed.
template <int OFFSET>
int wrong(Parameters& parameters, int words, uint32_t& first) {
  const int blocks = words / READS;
  std::vector<uint32_t> got(blocks * THREADS * READS);
  const size_t bytes = got.size() * sizeof got[0];
  parameters.stride = READS;
  int count = 0;
  bool done = ok(cudaMalloc(&parameters.out, bytes)) && ok(cudaMemset(parameters.out, 0xff, bytes));
  if (done) {
    read_at<OFFSET><<<blocks, THREADS>>>(parameters);
    done = ok(cudaGetLastError()) && ok(cudaDeviceSynchronize()) &&
           ok(cudaMemcpy(got.data(), parameters.out, bytes, cudaMemcpyDeviceToHost));
  }
  if (!done) return -1;
  for (int block = 0; block < blocks; block++) {
    for (int i = 0; i < READS; i++) {
      count += got[block * THREADS * READS + i] != mark(OFFSET + 4 * (block * READS + i));
    }
  }
  first = got[0];
  ok(cudaFree(parameters.out));
  return count;
}

}  // namespace

int main() {
  static Parameters parameters;
  for (int i = 0; i < WORDS; i++) parameters.words[i] = mark(LEAD + 4 * i);
  constexpr int COUNT = (0x7ff8 - FIRST) / 4 / READS * READS;
  constexpr int BELOW = FIRST - 4 * COUNT;  // the control: as many words right below
  uint32_t first = 0, first_below = 0;
  const int below = wrong<BELOW>(parameters, COUNT, first_below);
  if (below < 0) return 1;
  const int above = wrong<FIRST>(parameters, COUNT, first);
  if (above < 0) return 1;
  std::printf(
      "{\"first_offset\": %d, \"words\": %d, \"wrong\": %d, \"wrong_below\": %d, \"first\": \"%#x\", "
      "\"wanted\": \"%#x\"}\n",
      FIRST, COUNT, above, below, first, mark(FIRST));
  return 0;
}
