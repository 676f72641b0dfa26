// Values of one storage format on their way between memory and fp32 registers, 16 bytes at a time or one by
// one.
#pragma once
#include "../common/types.h"
#include "runtime.h"

namespace danlu {

// The emulator counts traffic, and stops at an address that a GPU would not take.
#if defined(DANLU_EMULATOR)
#define COUNT_READ(p, bytes) emulator::machine().read.touch(p, bytes)
#define COUNT_WRITTEN(p, bytes) emulator::machine().written.touch(p, bytes)
#define CHECK_ALIGNED(p) emulator::check_aligned(p, pack_bytes)
#else
#define COUNT_READ(p, bytes)
#define COUNT_WRITTEN(p, bytes)
#define CHECK_ALIGNED(p)
#endif

__device__ __forceinline__ float converted(float x) { return x; }
__device__ __forceinline__ double converted(double x) { return x; }
template <class T>
__device__ __forceinline__ float converted(T x) {
  return to_float(x);
}

__device__ __forceinline__ void convert(float x, float* to) { *to = x; }
__device__ __forceinline__ void convert(double x, double* to) { *to = x; }
template <class T>
__device__ __forceinline__ void convert(float x, T* to) {
  *to = from_float<T>::convert(x);
}

template <class T>
__device__ __forceinline__ auto load(const T* p) {
  COUNT_READ(p, sizeof(T));
  return converted(*p);
}

template <class T, class X>
__device__ __forceinline__ void store(T* p, X x) {
  COUNT_WRITTEN(p, sizeof(T));
  convert(x, p);
}

template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

constexpr uintptr_t pack_bytes = 16;

// n values from an address that is a multiple of 16 bytes
template <int n, class T>
__device__ __forceinline__ void load_packs(const T* p, float (&to)[n]) {
  static_assert(n % Pack<T>::size == 0);
  CHECK_ALIGNED(p);
  COUNT_READ(p, n * sizeof(T));
#pragma unroll
  for (int i = 0; i < n / Pack<T>::size; i++) {
    const Pack<T> pack = reinterpret_cast<const Pack<T>*>(p)[i];
#pragma unroll
    for (int j = 0; j < Pack<T>::size; j++) to[i * Pack<T>::size + j] = converted(pack.values[j]);
  }
}

template <int n, class T>
__device__ __forceinline__ void store_packs(T* p, const float (&from)[n]) {
  static_assert(n % Pack<T>::size == 0);
  CHECK_ALIGNED(p);
  COUNT_WRITTEN(p, n * sizeof(T));
#pragma unroll
  for (int i = 0; i < n / Pack<T>::size; i++) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < Pack<T>::size; j++) convert(from[i * Pack<T>::size + j], &pack.values[j]);
    reinterpret_cast<Pack<T>*>(p)[i] = pack;
  }
}

// One value from any address, or some as load_packs() has them.
template <int n, class T>
__device__ __forceinline__ void load_values(const T* p, float (&to)[n]) {
  if constexpr (n > 1)
    load_packs(p, to);
  else
    to[0] = load(p);
}

template <int n, class T>
__device__ __forceinline__ void store_values(T* p, const float (&from)[n]) {
  if constexpr (n > 1)
    store_packs(p, from);
  else
    store(p, from[0]);
}

}  // namespace danlu
