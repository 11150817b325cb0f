// Passes over a row on the CPU, in chunks; what later passes read is asked for meanwhile.
#pragma once

#include <cstdint>

#include "../shared/cpu.h"

namespace boosterbit {
namespace {

constexpr int64_t kChunk = 64;  // elements between two rounds of prefetches
constexpr int64_t kLine = 64;   // bytes of a cache line
// Elements of a row that are fetched ahead; more would push out of the cache what waits in it.
constexpr int64_t kMaxAhead = 1 << 15;

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

// body(begin, end) for each chunk of n elements, after later(begin) has asked for the chunk of what comes later. What is
// left comes last and on its own, so that the loop over whole chunks keeps its sums in registers.
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

// body(i) for each element from `begin` to `end`, in any order.
template <class Body>
INLINE void any_order(int64_t begin, int64_t end, const Body& body) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) body(i);
}

// The same for each of n elements, chunk by chunk.
template <class Later, class Body>
INLINE void in_any_order(int64_t n, const Later& later, const Body& body) {
  in_chunks(n, later, [&](int64_t begin, int64_t end) INLINE_BODY { any_order(begin, end, body); });
}

}  // namespace
}  // namespace boosterbit
