// Passes over a row on the CPU: sums whose order no vector width changes, and what later passes read asked for meanwhile.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../shared/cpu.h"

namespace boosterbit {
namespace {

constexpr int kLanes = 8;
constexpr int64_t kChunk = 64;  // elements between two rounds of prefetches
constexpr int64_t kLine = 64;   // bytes of a cache line
// Elements of a row that are fetched ahead; more would push out of the cache what waits in it.
constexpr int64_t kMaxAhead = 1 << 15;

// A sum in the same order whatever the width of a vector: element i goes to lane i % kLanes, and the lanes are added in
// pairs. Double: squares of 1e30 do not overflow, squares of 1e-30 do not vanish, and a sum over 20,000 loses nothing.
struct Sum {
  double lane[kLanes] = {};

  INLINE void add(int k, double x) { lane[k] += x; }

  template <class Processor>
  INLINE void add_product(int k, double x, double y) {
    lane[k] = plus_product<Processor>(lane[k], x, y);
  }

  INLINE double total() const {
    const double* x = lane;
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
  }
};
static_assert(kLanes == 8, "Sum::total adds 8 lanes");

// An array that a later pass reads or writes, asked for while this one computes: so memory works while sums are made,
// and sums need not wait for memory.
template <class T>
class Ahead {
 public:
  Ahead() = default;
  INLINE Ahead(const T* first, int64_t n) : first_(first), n_(n < kMaxAhead ? n : kMaxAhead) {}

  // The lines of the chunk that begins with element i. Into the second-level cache: fills of the first that wait for
  // memory would hold up what this pass reads.
  INLINE void fetch(int64_t i) const {
    if (i >= n_) return;
    const char* chunk = reinterpret_cast<const char*>(first_ + i);
    for (int64_t byte = 0; byte < kChunk * static_cast<int64_t>(sizeof(T)); byte += kLine) {
      __builtin_prefetch(chunk + byte, 0, 2);
    }
  }

 private:
  const T* first_ = nullptr;
  int64_t n_ = 0;  // elements
};

// For a pass that asks for nothing.
constexpr auto kNothing = [](int64_t) INLINE_BODY {};

// body(begin, end) for each chunk of n elements, after later(begin) has asked for the chunk of what comes later. What is left
// comes last and on its own, so that the loop over whole chunks keeps its sums in registers.
template <class Later, class Body>
INLINE void in_chunks(int64_t n, const Later& later, const Body& body) {
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    later(i);
    body(i, i + kChunk);
  }
  if (i == n) return;
  later(i);
  body(i, n);
}

// body(i) for each element from `begin` to `end`, in any order; body(i, lane), lanes as in Sum.
template <class Body>
INLINE void any_order(int64_t begin, int64_t end, const Body& body) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) body(i);
}

template <class Body>
INLINE void lanes(int64_t begin, int64_t end, const Body& body) {
  const int64_t whole = (end - begin) / kLanes;
  for (int64_t j = 0; j < whole; ++j) {
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) body(begin + j * kLanes + k, k);
  }
  const int64_t i = begin + whole * kLanes;
  for (int k = 0; k < end - i; ++k) body(i + k, k);
}

// The same for each of n elements, chunk by chunk.
template <class Later, class Body>
INLINE void in_any_order(int64_t n, const Later& later, const Body& body) {
  in_chunks(n, later, [&](int64_t begin, int64_t end) INLINE_BODY { any_order(begin, end, body); });
}

template <class Later, class Body>
INLINE void in_lanes(int64_t n, const Later& later, const Body& body) {
  in_chunks(n, later, [&](int64_t begin, int64_t end) INLINE_BODY { lanes(begin, end, body); });
}

// body(i, lane, float of grads[i]). Halves become floats apart: with doubles in one loop they leave vectors half empty.
template <class Grad, class Later, class Body>
INLINE void in_lanes_with(const Grad* grads, int64_t n, const Later& later, const Body& body) {
  if constexpr (std::is_same_v<Grad, float>) {
    in_lanes(n, later, [&](int64_t i, int k) INLINE_BODY { body(i, k, grads[i]); });
  } else {
    in_chunks(n, later, [&](int64_t begin, int64_t end) INLINE_BODY {
      float values[kChunk];
      any_order(begin, end, [&](int64_t i) INLINE_BODY { values[i - begin] = grads[i]; });
      lanes(begin, end, [&](int64_t i, int k) INLINE_BODY { body(i, k, values[i - begin]); });
    });
  }
}

// first(i) for each of a chunk, then after(i, lane). Apart, because sums in one loop with an update that has a
// condition do not stay in registers: that took an eighth of what a step computes.
template <class Later, class First, class After>
INLINE void in_any_order_then_lanes(int64_t n, const Later& later, const First& first, const After& after) {
  in_chunks(n, later, [&](int64_t begin, int64_t end) INLINE_BODY {
    any_order(begin, end, first);
    lanes(begin, end, after);
  });
}

}  // namespace
}  // namespace boosterbit
