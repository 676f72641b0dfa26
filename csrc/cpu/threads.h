// Threads and their floating-point mode.
#pragma once
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace danlu {

// Round to nearest, keep subnormals, trap nothing, for as long as it lives. torch.set_flush_denormal reaches
// only the thread that calls it, so that results would depend on which thread took a chunk.
class IeeeArithmetic {
 public:
#if defined(__x86_64__)
  IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~IeeeArithmetic() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  IeeeArithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
  }
  ~IeeeArithmetic() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
#error "danlu._cpu knows x86-64 and aarch64"
#endif
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;

 private:
#if defined(__x86_64__)
  unsigned saved_;
#else
  uint64_t saved_;
#endif
};

// Calls work(i) for every i in [0, count) from at most `threads` threads, which claim one i after the other.
template <class Work>
void parallel_claims(int64_t count, int threads, const Work& work) {
  // OpenMP hangs in a forked child whose parent had a team
  static const pid_t creator = getpid();
  const int team = getpid() == creator ? int(std::min<int64_t>(threads, count)) : 1;
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const IeeeArithmetic scope;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  }
}

}  // namespace danlu
