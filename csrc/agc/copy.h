// Copies of the parameters on the CPU, standardized where their group is: what the network computes with.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "passes.h"
#include "step.h"
#include "sums.h"

namespace boosterbit {
namespace {

// The copy of a unit of n parameters.
struct Copy {
  const float* from = nullptr;
  void* to = nullptr;  // null: none is written
  int64_t n = 0;
  bool standardized = false;
  Standardizer standardizer{};
  bool numbers = false;  // standardized, no element is NaN
};

// From the sums over a row's parameters. Of so small squares none is NaN or infinite, nor is a difference from the mean;
// and 0 times such an inverse is 0.
template <class Hyper>
INLINE void standardize(const Moments& moments, const Hyper& hyper, Copy& copy) {
  const double squares = moments.squares.total();
  copy.standardizer = standardizer(moments.sum.total(), squares, 1.0 / copy.n, hyper);
  copy.numbers = squares < 1e60 && copy.standardizer.inverse < 1e30f;
}

template <class Rule>
INLINE Copy copy_of(const Step<Rule>& step, const Arrays<Rule>& tensor, const Unit& unit,
                    const typename Rule::Hyper& hyper) {
  if (!tensor.copy) return Copy{};
  const int64_t width = step.copy == Dtype::f32 ? 4 : 2;
  return Copy{tensor.param + unit.offset, static_cast<char*>(tensor.copy) + unit.offset * width, unit.length,
              hyper.standardize_eps >= 0.0f};
}

// to[i] = value(i), a T, for each of n elements, whole lines past the cache: a line that is written in the cache is read
// first, and nobody reads these before the next forward pass. end_of_copies() before another thread does.
template <class T, class Value>
INLINE void write_past_cache(T* to, int64_t n, const Value& value) {
  const auto write = [&](int64_t begin, int64_t end) INLINE_BODY {
    any_order(begin, end, [&](int64_t i) INLINE_BODY { to[i] = value(i); });
  };
#if defined(__SSE2__)
  constexpr int64_t kElements = kLine / sizeof(T);
  const int64_t before = -reinterpret_cast<uintptr_t>(to) % kLine / sizeof(T);
  int64_t i = before < n ? before : n;
  write(0, i);
  for (; i + kElements <= n; i += kElements) {
    alignas(kLine) T line[kElements];
    any_order(0, kElements, [&](int64_t k) INLINE_BODY { line[k] = value(i + k); });
    const __m128i* from = reinterpret_cast<const __m128i*>(line);
    for (int part = 0; part < 4; ++part) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i) + part, from[part]);
  }
  write(i, n);
#else
  write(0, n);
#endif
}

INLINE void end_of_copies() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
INLINE void write(const Copy& copy) {
  T* to = static_cast<T*>(copy.to);
  const float* __restrict__ from = copy.from;
  const Standardizer s = copy.standardizer;
  const auto standardized = [&](int64_t i) INLINE_BODY { return (from[i] - s.mean) * s.inverse; };
  if (copy.numbers) {
    write_past_cache(to, copy.n, [&](int64_t i) INLINE_BODY { return cast_number<T>(standardized(i)); });
  } else if (copy.standardized) {
    write_past_cache(to, copy.n, [&](int64_t i) INLINE_BODY { return cast<T>(standardized(i)); });
  } else {
    write_past_cache(to, copy.n, [&](int64_t i) INLINE_BODY { return cast<T>(from[i]); });
  }
}

INLINE void write(Dtype dtype, const Copy& copy) {
  if (!copy.to) return;
  if (dtype == Dtype::f32) write<float>(copy);
  if (dtype == Dtype::f16) write<c10::Half>(copy);
  if (dtype == Dtype::bf16) write<c10::BFloat16>(copy);
}

}  // namespace
}  // namespace boosterbit
