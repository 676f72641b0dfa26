// The threads of a step.
#pragma once
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "../common/ieee.h"

namespace danlu {

// Calls work(i) for every i in [0, count) from at most `threads` threads, which item one i after the other.
template <class Work>
void parallel_items(int64_t count, int threads, const Work& work) {
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
