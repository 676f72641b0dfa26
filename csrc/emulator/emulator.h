// Runs CUDA kernels on the CPU, for tests (x86-64): one fiber for each CUDA thread of a block, block after
// block. Kernels are compiled as C++ with what this header defines; barriers, shuffles and shared memory work
// as on a GPU, a barrier that not all threads reach is an error, and shared memory starts as garbage.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__ &  // behind a parameter's type: "const List __grid_constant__ list"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  uint64_t count() const { return uint64_t(x) * y * z; }
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
};
using cudaStream_t = struct CUstream_st*;

namespace emulator {

struct Launch {
  uint64_t blocks, threads, parameter_bytes;
  uintptr_t stream;
  int device;
  bool early;  // may start while the launch before it ends
};

struct Grid {
  dim3 blocks, threads;
  bool early = false;
  std::function<void()> kernel;
};

// Memory that kernels touch by load() and store(): what a launch touches again is in the cache.
struct Traffic {
  static constexpr uintptr_t sector = 32;  // bytes that a GPU moves at a time
  bool counts = false;
  uint64_t bytes = 0;
  std::unordered_set<uintptr_t> touched;  // in this launch

  void touch(const void* p, size_t size) {
    if (!counts) return;
    const uintptr_t from = reinterpret_cast<uintptr_t>(p);
    for (uintptr_t s = from / sector; s <= (from + size - 1) / sector; s++)
      bytes += touched.insert(s).second ? sector : 0;
  }
};

// A launch for whoever executes other code in the kernel's place, such as what a compiler made of it.
struct Call {
  uintptr_t place;  // of the kernel in the file of this module, where its symbol table names it
  dim3 grid, block;
  std::string parameters;  // as they lie in CUDA's parameter space
  uintptr_t stream;
};

// What the emulated machine has and does; tests set it and look.
struct Machine {
  int device_count = 1, device = 0;
  int driver_version = 13000, runtime_version = 13000;
  int capability = 90;
  int fail_launch = -1;  // index of a launch that fails, counted from now
  cudaError_t failure = cudaErrorNoKernelImageForDevice;
  uint64_t first_block = 0, end_block = ~uint64_t{0};  // only these blocks of a grid run
  bool backwards = false;                              // the last block and the last thread go first
  // A launch that may start early starts at once, and the one before it when all threads of a block wait for
  // it; finish() runs what is left.
  bool overlaps = false;
  std::vector<Grid> started;
  std::function<void(const Call&)> executor;  // if set, is called where the kernel would run
  std::vector<Launch> launches;
  Traffic read, written;
};
Machine& machine();

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Block {
  dim3 index;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> slots;  // one for each thread: what it gives in a shuffle
  std::vector<int> sites;       // ... and which shuffle of the source text that is
  std::map<const void*, std::unique_ptr<char[]>> shared;
};

struct Fiber {
  void* stack_pointer;
  Block* block;
  dim3 thread;
  int rank;  // within the block
  bool done = false;
  bool waited = false;         // for the launch before
  void* fake_stack = nullptr;  // of the address sanitizer
};

Fiber& current();
void wait(Barrier& barrier);
void wait_for_launch_before();
void run(Grid grid);
void finish();
void* shared_memory(const void* key, size_t bytes);

inline void check_aligned(const void* p, uintptr_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) throw std::runtime_error("emulator: misaligned address");
}

// A warp whose lanes wait in different shuffles would hang, or exchange nothing.
template <class T>
T exchange(T value, int source_lane, int site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Fiber& self = current();
  Barrier& warp = self.block->warps[self.rank / 32];
  std::memcpy(&self.block->slots[self.rank], &value, sizeof value);
  self.block->sites[self.rank] = site;
  wait(warp);
  if (self.block->sites[self.rank / 32 * 32] != site)
    throw std::runtime_error("emulator: lanes of a warp in different shuffles");
  T received = value;
  if (source_lane >= 0 && source_lane < warp.expected)
    std::memcpy(&received, &self.block->slots[self.rank / 32 * 32 + source_lane], sizeof received);
  wait(warp);
  return received;
}

inline int lane() { return current().rank % 32; }

}  // namespace emulator

#define threadIdx (emulator::current().thread)
#define blockIdx (emulator::current().block->index)
extern dim3 gridDim, blockDim;  // no macros: fields of cudaLaunchConfig_t are called so, too
#define SHARED_ARRAY(type, name, size) \
  static const char name##_key = 0;    \
  type* const name = static_cast<type*>(emulator::shared_memory(&name##_key, sizeof(type) * (size)))

inline void __syncthreads() { emulator::wait(emulator::current().block->all); }

inline void __syncwarp(unsigned = ~0u) {
  emulator::wait(emulator::current().block->warps[emulator::current().rank / 32]);
}

#define __shfl_sync(mask, value, lane) emulator::exchange(value, lane, __COUNTER__)
#define __shfl_xor_sync(mask, value, bits) emulator::exchange(value, emulator::lane() ^ (bits), __COUNTER__)

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace emulator {
// A device runs one launch after the other, whichever thread makes it.
std::unique_lock<std::mutex> on_device();

// Notes the launch; what it returns is the launch's error.
cudaError_t begin_launch(dim3 grid, dim3 block, uint64_t parameter_bytes, cudaStream_t stream, bool early);
}  // namespace emulator

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {
template <class... A, size_t... i>
std::function<void()> bound(void (*kernel)(A...), void** arguments, std::index_sequence<i...>) {
  std::tuple<std::remove_cv_t<std::remove_reference_t<A>>...> copies(
      *static_cast<std::remove_reference_t<A>*>(arguments[i])...);
  return [kernel, copies] { std::apply(kernel, copies); };
}

// Hands a launch to machine().executor.
void hand_over(const void* kernel, dim3 grid, dim3 block, std::string parameters, cudaStream_t stream);

template <class P>
void append(std::string& parameters, const void* argument) {
  parameters.resize((parameters.size() + alignof(P) - 1) / alignof(P) * alignof(P));
  parameters.append(static_cast<const char*>(argument), sizeof(P));
}

template <class... A, size_t... i>
std::string packed(void** arguments, std::index_sequence<i...>) {
  std::string parameters;
  (append<std::remove_reference_t<A>>(parameters, arguments[i]), ...);
  return parameters;
}

template <class... A>
cudaError_t launch(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, cudaStream_t stream,
                   bool early) {
  const auto alone = on_device();
  const cudaError_t error = begin_launch(grid, block, (sizeof(A) + ... + 0), stream, early);
  if (error != cudaSuccess) return error;
  constexpr auto all = std::index_sequence_for<A...>();
  if (machine().executor)
    hand_over(reinterpret_cast<const void*>(kernel), grid, block, packed<A...>(arguments, all), stream);
  else
    run({grid, block, early, bound(kernel, arguments, all)});
  return error;
}
}  // namespace emulator

template <class... A>
cudaError_t cudaLaunchKernel(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t stream) {
  return emulator::launch(kernel, grid, block, arguments, stream, false);
}

template <class... A, class... B>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(A...), const B&... given) {
  void* arguments[] = {const_cast<B*>(&given)...};
  return emulator::launch(kernel, config->gridDim, config->blockDim, arguments, config->stream,
                          config->numAttrs > 0 && config->attrs->val.programmaticStreamSerializationAllowed);
}
