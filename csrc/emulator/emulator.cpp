#include "emulator.h"

#include <dlfcn.h>

#include <algorithm>
#include <exception>

#include "../common/ieee.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a call preserves, and goes on where `to` was saved. Not ucontext's, which makes a
// system call each time.
extern "C" void danlu_switch_stack(void** from, void* to);
asm(R"(
  .text
  .local danlu_switch_stack
  danlu_switch_stack:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

dim3 gridDim, blockDim;

namespace emulator {
namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr int saved_registers = 6;

struct Scheduler {
  void* stack_pointer = nullptr;  // of the thread that runs the fibers
  Fiber* fiber = nullptr;
  Grid grid;
  bool before = false;  // whether the launch before, for which this one waits, has not run
  std::exception_ptr failure;
  bool progress = false;
  std::vector<std::unique_ptr<char[]>> stacks;
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};

Scheduler scheduler;

char* stack_of(const Fiber& fiber) { return scheduler.stacks[fiber.rank].get(); }

// The address sanitizer has to be told which stack is in use.
void into_fiber([[maybe_unused]] Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, stack_of(fiber), stack_bytes);
#endif
  danlu_switch_stack(&scheduler.stack_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

void out_of_fiber(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, scheduler.bottom, scheduler.size);
#endif
  danlu_switch_stack(&fiber.stack_pointer, scheduler.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler.bottom, &scheduler.size);
#endif
}

void fiber_main() {
  Fiber& fiber = *scheduler.fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#endif
  try {
    scheduler.grid.kernel();
    if (scheduler.grid.early && !fiber.waited)
      throw std::runtime_error("emulator: a thread of a launch that may start early has not waited");
  } catch (...) {
    scheduler.failure = std::current_exception();
  }
  fiber.done = true;
  scheduler.progress = true;
  out_of_fiber(fiber);
}

void prepare(Fiber& fiber) {
  void** top =
      reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack_of(fiber)) + stack_bytes) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < saved_registers; i++) *--top = nullptr;
  fiber.stack_pointer = top;
}

void run_last_started();

// While the threads of a block wait.
void run_launch_before() {
  Scheduler waiting = std::exchange(scheduler, Scheduler());
  const auto resume = [&] {
    scheduler = std::move(waiting);
    scheduler.before = false;
    gridDim = scheduler.grid.blocks;
    blockDim = scheduler.grid.threads;
  };
  try {
    run_last_started();
  } catch (...) {
    resume();
    throw;
  }
  resume();
}

void run_block(dim3 index) {
  const dim3& size = scheduler.grid.threads;
  const int threads = int(size.count());
  Block block;
  block.index = index;
  block.all.expected = threads;
  block.warps.resize((threads + 31) / 32);
  for (size_t w = 0; w < block.warps.size(); w++)
    block.warps[w].expected = std::min(32, threads - int(w) * 32);
  block.slots.resize(threads);
  block.sites.resize(threads);
  while (int(scheduler.stacks.size()) < threads) scheduler.stacks.emplace_back(new char[stack_bytes]);

  std::vector<Fiber> fibers(threads);
  for (int i = 0; i < threads; i++) {
    fibers[i].block = &block;
    fibers[i].rank = i;
    fibers[i].thread = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
    prepare(fibers[i]);
  }
  for (int left = threads; left > 0;) {
    scheduler.progress = false;
    for (int i = 0; i < threads; i++) {
      Fiber& fiber = fibers[machine().backwards ? threads - 1 - i : i];
      if (fiber.done) continue;
      scheduler.fiber = &fiber;
      into_fiber(fiber);
      if (scheduler.failure) std::rethrow_exception(std::exchange(scheduler.failure, nullptr));
      left -= fiber.done;
    }
    if (!scheduler.progress && scheduler.before) {
      run_launch_before();
      scheduler.progress = true;
    }
    if (!scheduler.progress) throw std::runtime_error("emulator: a barrier that not all threads reach");
  }
}

}  // namespace

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

Fiber& current() { return *scheduler.fiber; }

void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    barrier.generation++;
    scheduler.progress = true;
    return;
  }
  Fiber& fiber = current();
  while (barrier.generation == generation) out_of_fiber(fiber);
}

void* shared_memory(const void* key, size_t bytes) {
  std::unique_ptr<char[]>& memory = current().block->shared[key];
  if (!memory) {
    memory.reset(new char[bytes]);
    std::memset(memory.get(), 0x7f, bytes);
  }
  return memory.get();
}

void wait_for_launch_before() {
  current().waited = true;
  while (scheduler.before) out_of_fiber(current());
}

void run(Grid grid) {
  Machine& m = machine();
  if (!grid.early) finish();
  m.started.push_back(std::move(grid));
  if (!m.overlaps) finish();
}

void finish() {
  while (!machine().started.empty()) run_last_started();
}

namespace {
void run_last_started() {
  scheduler.grid = std::move(machine().started.back());
  machine().started.pop_back();
  scheduler.before = !machine().started.empty();
  const dim3 grid = gridDim = scheduler.grid.blocks;
  blockDim = scheduler.grid.threads;
  const danlu::IeeeArithmetic scope;  // a GPU flushes nothing
  const uint64_t first = machine().first_block, end = std::min(grid.count(), machine().end_block);
  for (uint64_t i = first; i < end; i++) {
    const uint64_t at = machine().backwards ? end - 1 - (i - first) : i;
    run_block(dim3(unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)));
  }
}
}  // namespace

void hand_over(const void* kernel, dim3 grid, dim3 block, std::string parameters, cudaStream_t stream) {
  Dl_info module;
  if (!dladdr(kernel, &module)) throw std::runtime_error("emulator: a kernel outside of every module");
  const danlu::IeeeArithmetic scope;
  machine().executor({reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(module.dli_fbase),
                      grid, block, std::move(parameters), reinterpret_cast<uintptr_t>(stream)});
}

std::unique_lock<std::mutex> on_device() {
  static std::mutex launching;
  return std::unique_lock(launching);
}

cudaError_t begin_launch(dim3 grid, dim3 block, uint64_t parameter_bytes, cudaStream_t stream, bool early) {
  Machine& m = machine();
  if (m.fail_launch == 0) {
    m.fail_launch = -1;
    return m.failure;
  }
  if (m.fail_launch > 0) m.fail_launch--;
  if (grid.count() == 0 || grid.x > 0x7fffffffu || block.count() == 0 || block.count() > 1024)
    return cudaErrorInvalidConfiguration;
  m.read.touched.clear();
  m.written.touched.clear();
  m.launches.push_back(
      {grid.count(), block.count(), parameter_bytes, reinterpret_cast<uintptr_t>(stream), m.device, early});
  return cudaSuccess;
}

}  // namespace emulator

using emulator::machine;

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  if (machine().driver_version < machine().runtime_version / 1000 * 1000) return cudaErrorInsufficientDriver;
  if (machine().device_count == 0) return cudaErrorNoDevice;
  *count = machine().device_count;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = machine().device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= machine().device_count) return cudaErrorInvalidDevice;
  machine().device = device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = machine().driver_version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = machine().runtime_version;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    default:
      return "unknown error";
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = machine().capability;
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  return cudaSuccess;
}
