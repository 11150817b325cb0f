// What the CPU operators share: clones for several processors, and conversions that the compiler makes vectors of.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define INLINE_BODY __attribute__((always_inline))

namespace boosterbit {

// What code is compiled for, and whether it has AVX2 and a fused multiply-add there.
struct Baseline {
  static constexpr bool kAvx2 = false;
#ifdef __FP_FAST_FMA
  static constexpr bool kFused = true;
#else
  static constexpr bool kFused = false;
#endif
};
struct Avx2 {
  static constexpr bool kAvx2 = true;
  static constexpr bool kFused = true;
};
struct Avx512 {
  static constexpr bool kAvx2 = true;
  static constexpr bool kFused = true;
};

// body(processor) compiled for plain x86-64, for AVX2 and for AVX-512; of these this processor takes the last that it can
// and may. `body` must be INLINE_BODY, as must all that it calls. No -march=native: the node that compiles and the nodes
// that train differ. Sums in an order that no vector width changes, and fused only where that changes nothing, so that
// the choice changes no bit.
#if !defined(BASELINE_ONLY) && defined(__x86_64__) && defined(__GNUC__)
#define ON_AVX2 __attribute__((target("avx2,fma,bmi,bmi2")))

template <class Body>
ON_AVX2 void on_avx2(const Body& body) {
  body(Avx2());
}

template <class Body>
__attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi,bmi2")))
void on_avx512(const Body& body) {
  body(Avx512());
}

// Bits of the widest vectors that ATEN_CPU_CAPABILITY allows, torch's own switch for its operators.
static inline int widest_allowed() {
  static const int bits = [] {
    const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
    if (wish && !std::strcmp(wish, "default")) return 128;
    return wish && !std::strcmp(wish, "avx2") ? 256 : 512;
  }();
  return bits;
}

#define HAS(feature) __builtin_cpu_supports(feature)
template <class Body>
void on_this_processor(const Body& body) {
  const int widest = widest_allowed();
  if (widest >= 256 && HAS("avx2") && HAS("fma") && HAS("bmi") && HAS("bmi2")) {
    if (widest >= 512 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512cd") && HAS("avx512dq") && HAS("avx512vl")) {
      return on_avx512(body);
    }
    return on_avx2(body);
  }
  body(Baseline());
}
#undef HAS
#else
template <class Body>
void on_this_processor(const Body& body) {
  body(Baseline());
}
#endif

template <class T>
INLINE T cast(float x) {
  return static_cast<T>(x);
}

// The same for what is not NaN, which may be less work.
template <class T>
INLINE T cast_number(float x) {
  return static_cast<T>(x);
}

// c10's conversion, without its branch: to the nearest, ties to even; the compiler then makes vectors of it.
template <>
INLINE c10::BFloat16 cast_number<c10::BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return c10::BFloat16(static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16),
                       c10::BFloat16::from_bits());
}

template <>
INLINE c10::BFloat16 cast<c10::BFloat16>(float x) {
  const uint16_t number = cast_number<c10::BFloat16>(x).x;
  return c10::BFloat16(static_cast<uint16_t>(x != x ? 0x7fc0u : number), c10::BFloat16::from_bits());
}

}  // namespace boosterbit
