// Values of one storage format on their way between memory and fp32 registers, 16 bytes at a time or one by
// one.
#pragma once
#include "../types.h"
#include "runtime.h"

namespace danlu {

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ void store(float* p, float x) { *p = x; }

template <class T>
__device__ __forceinline__ float load(const T* p) {
  return to_float(*p);
}

template <class T>
__device__ __forceinline__ void store(T* p, float x) {
  *p = from_float<T>::convert(x);
}

template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

constexpr uintptr_t pack_bytes = 16;

// The emulator stops at an address that a GPU would not take.
#if defined(DANLU_EMULATOR)
#define CHECK_ALIGNED(p) emulator::check_aligned(p, pack_bytes)
#else
#define CHECK_ALIGNED(p)
#endif

// n values from an address that is a multiple of 16 bytes
template <int n, class T>
__device__ __forceinline__ void load_packs(const T* p, float (&to)[n]) {
  static_assert(n % Pack<T>::size == 0);
  CHECK_ALIGNED(p);
#pragma unroll
  for (int i = 0; i < n / Pack<T>::size; i++) {
    const Pack<T> pack = reinterpret_cast<const Pack<T>*>(p)[i];
#pragma unroll
    for (int j = 0; j < Pack<T>::size; j++) to[i * Pack<T>::size + j] = load(&pack.values[j]);
  }
}

template <int n, class T>
__device__ __forceinline__ void store_packs(T* p, const float (&from)[n]) {
  static_assert(n % Pack<T>::size == 0);
  CHECK_ALIGNED(p);
#pragma unroll
  for (int i = 0; i < n / Pack<T>::size; i++) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < Pack<T>::size; j++) store(&pack.values[j], from[i * Pack<T>::size + j]);
    reinterpret_cast<Pack<T>*>(p)[i] = pack;
  }
}

}  // namespace danlu
