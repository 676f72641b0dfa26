// The bandwidth ceiling: a loop that does nothing but the reads and writes of an in-place optimizer step.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "threads.h"

namespace danlu {

namespace ceiling_detail {
constexpr int64_t chunk = 65536;

// at most 256 bits, so that the figures of all machines are of one measure
#if defined(__x86_64__) && defined(__gnu_linux__)
#define YARDSTICK __attribute__((target_clones("avx2", "default")))
#else
#define YARDSTICK
#endif

YARDSTICK static void update(float* __restrict a, float* __restrict b, float* __restrict c,
                             const float* __restrict g, int64_t n) {
  if (c)
    for (int64_t i = 0; i < n; i++) {
      const float x = g[i];
      a[i] += x;
      b[i] += x;
      c[i] += x;
    }
  else if (b)
    for (int64_t i = 0; i < n; i++) {
      const float x = g[i];
      a[i] += x;
      b[i] += x;
    }
  else
    for (int64_t i = 0; i < n; i++) a[i] += g[i];
}

// Something that needs every element, and next to no time.
YARDSTICK static uint32_t combine(const uint32_t* x, int64_t n) {
  uint32_t all = 0;
  for (int64_t i = 0; i < n; i++) all ^= x[i];
  return all;
}
#undef YARDSTICK
}  // namespace ceiling_detail

// Reads fp32 elements and does nothing else: the ceiling of a norm.
inline uint32_t read_through(uintptr_t address, int64_t size, int threads) {
  constexpr int64_t chunk = 4 * ceiling_detail::chunk;
  const uint32_t* x = reinterpret_cast<const uint32_t*>(address);
  std::atomic<uint32_t> all{0};
  parallel_items((size + chunk - 1) / chunk, threads, [&](int64_t item) {
    all ^= ceiling_detail::combine(x + item * chunk, std::min(size - item * chunk, chunk));
  });
  return all;
}

// Every written array is read and written, `read` only read: Lion's traffic is two written arrays, AdamW's
// three. Addresses of fp32 arrays of `size` elements.
inline void bandwidth_ceiling(const std::vector<uintptr_t>& written, uintptr_t read, int64_t size,
                              int threads) {
  if (written.empty() || written.size() > 3)
    throw std::invalid_argument("bandwidth_ceiling writes 1 to 3 arrays");
  float* arrays[3] = {};
  for (size_t i = 0; i < written.size(); i++) arrays[i] = reinterpret_cast<float*>(written[i]);
  const float* g = reinterpret_cast<const float*>(read);
  const auto shift = [](float* base, int64_t by) { return base ? base + by : nullptr; };
  parallel_items((size + ceiling_detail::chunk - 1) / ceiling_detail::chunk, threads, [&](int64_t item) {
    const int64_t at = item * ceiling_detail::chunk, n = std::min(size - at, ceiling_detail::chunk);
    ceiling_detail::update(arrays[0] + at, shift(arrays[1], at), shift(arrays[2], at), g + at, n);
  });
}

}  // namespace danlu
