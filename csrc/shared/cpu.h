// What the CPU operators share: clones for several processors, and conversions that the compiler makes vectors of.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

// One source, compiled for plain x86-64, for AVX2 and for AVX-512; the loader picks. No -march=native: the node that
// compiles and the nodes that train differ. No fused multiply-add, and sums in an order that no vector width changes, so
// that the choice changes no bit.
#if !defined(FOR_EACH_CPU)
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#elif defined(__x86_64__) && defined(__linux__) && (defined(__GNUC__) || defined(__clang__))
#define FOR_EACH_CPU __attribute__((target_clones("default", "avx2")))
#else
#define FOR_EACH_CPU
#endif
#endif
#define INLINE inline __attribute__((always_inline))
#define INLINE_BODY __attribute__((always_inline))

namespace boosterbit {

template <class T>
INLINE T cast(float x) {
  return static_cast<T>(x);
}

// c10's conversion, without its branch: to the nearest, ties to even; the compiler then makes vectors of it.
template <>
INLINE c10::BFloat16 cast<c10::BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return c10::BFloat16(static_cast<uint16_t>(x != x ? 0x7fc0u : rounded), c10::BFloat16::from_bits());
}

}  // namespace boosterbit
