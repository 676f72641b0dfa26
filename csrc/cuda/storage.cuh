// Values of one storage format on their way between memory and fp32 registers, in packs or one by one.
#pragma once
#include "../common/types.h"
#include "runtime.h"

namespace danlu {

// The emulator counts traffic, and stops at an address that a GPU would not take.
#if defined(DANLU_EMULATOR)
#define COUNT_READ(p, bytes) emulator::machine().read.touch(p, bytes)
#define COUNT_WRITTEN(p, bytes) emulator::machine().written.touch(p, bytes)
#define CHECK_ALIGNED(p, bytes) emulator::check_aligned(p, bytes)
#else
#define COUNT_READ(p, bytes)
#define COUNT_WRITTEN(p, bytes)
#define CHECK_ALIGNED(p, bytes)
#endif

// Accesses by addresses that were read from memory are generic unless the compiler is told.
template <class T>
__device__ __forceinline__ T* global(T* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// A number or an address that is made once: the compiler forgets of what, and cannot make it again at each
// use.
template <class T>
__device__ __forceinline__ void settled([[maybe_unused]] T& x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 8)
    asm("" : "+l"(x));
  else
    asm("" : "+r"(x));
#endif
}
template <class T>
__device__ __forceinline__ void settled([[maybe_unused]] T*& p) {
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(p));
  p = global(p);
#endif
}

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

constexpr uintptr_t pack_bytes = 16;  // the widest access, and what the arrays of a kernel are aligned to

// Neighbours that one access moves: n of them, or as many as have 16 bytes.
template <class T, int n = pack_bytes / sizeof(T)>
struct alignas(n * sizeof(T) < pack_bytes ? n * sizeof(T) : pack_bytes) Pack {
  static constexpr int size = n * sizeof(T) < pack_bytes ? n : pack_bytes / sizeof(T);
  T values[size];
};

template <class T, int n>
__device__ __forceinline__ void unpack(const Pack<T, n>& pack, float* to) {
#pragma unroll
  for (int j = 0; j < pack.size; j++) to[j] = converted(pack.values[j]);
}

// By words: one operation for each value, where a half of a word would first be taken out.
template <int n>
__device__ __forceinline__ void unpack(const Pack<bf16, n>& pack, float* to) {
  uint32_t words[pack.size / 2];
  __builtin_memcpy(words, &pack, sizeof words);
#pragma unroll
  for (int j = 0; j < pack.size / 2; j++) {
    to[2 * j] = as_float(words[j] << 16);
    to[2 * j + 1] = as_float(words[j] & 0xffff0000u);
  }
}

// n values from an address that is a multiple of their pack's size
template <int n, class T>
__device__ __forceinline__ void load_packs(const T* p, float (&to)[n]) {
  using P = Pack<T, n>;
  static_assert(n % P::size == 0);
  CHECK_ALIGNED(p, sizeof(P));
  COUNT_READ(p, n * sizeof(T));
#pragma unroll
  for (int i = 0; i < n / P::size; i++) {
    const P pack = reinterpret_cast<const P*>(p)[i];
    unpack(pack, to + i * P::size);
  }
}

template <int n, class T>
__device__ __forceinline__ void store_packs(T* p, const float (&from)[n]) {
  using P = Pack<T, n>;
  static_assert(n % P::size == 0);
  CHECK_ALIGNED(p, sizeof(P));
  COUNT_WRITTEN(p, n * sizeof(T));
#pragma unroll
  for (int i = 0; i < n / P::size; i++) {
    P pack;
#pragma unroll
    for (int j = 0; j < P::size; j++) convert(from[i * P::size + j], &pack.values[j]);
    reinterpret_cast<P*>(p)[i] = pack;
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

// Elements as they lie in memory; n as for load_values().
template <class E, int n>
struct Raw {
  E values[n];
};

template <int n, class E>
__device__ __forceinline__ Raw<E, n> load_raw(const E* p) {
  using P = Pack<E, n>;
  static_assert(n % P::size == 0);
  if (n > 1) CHECK_ALIGNED(p, sizeof(P));
  COUNT_READ(p, n * sizeof(E));
  Raw<E, n> raw;
#pragma unroll
  for (int i = 0; i < n / P::size; i++) {
    const P pack = reinterpret_cast<const P*>(p)[i];
#pragma unroll
    for (int j = 0; j < P::size; j++) raw.values[i * P::size + j] = pack.values[j];
  }
  return raw;
}

template <int n, class E>
__device__ __forceinline__ void store_raw(E* p, const Raw<E, n>& raw) {
  using P = Pack<E, n>;
  static_assert(n % P::size == 0);
  if (n > 1) CHECK_ALIGNED(p, sizeof(P));
  COUNT_WRITTEN(p, n * sizeof(E));
#pragma unroll
  for (int i = 0; i < n / P::size; i++) {
    P pack;
#pragma unroll
    for (int j = 0; j < P::size; j++) pack.values[j] = raw.values[i * P::size + j];
    reinterpret_cast<P*>(p)[i] = pack;
  }
}

}  // namespace danlu
