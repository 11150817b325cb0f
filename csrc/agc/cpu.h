// A step on the CPU, for any rule: each row is read for its norms, and updated while it is still in the cache. The
// functions are inlined into those that a rule's cpu.cpp has cloned for each kind of processor.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "../shared/cpu.h"
#include "scalar.h"
#include "step.h"

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

  INLINE double total() const {
    const double* x = lane;
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
  }
};
static_assert(kLanes == 8, "Sum::total adds 8 lanes");

// An array that a later pass reads or writes, asked for while this one computes: so memory works while sums are made,
// and sums need not wait for memory.
class Ahead {
 public:
  Ahead() = default;
  template <class T>
  INLINE Ahead(const T* first, int64_t n)
      : first_(reinterpret_cast<const char*>(first)), width_(sizeof(T)), n_(n < kMaxAhead ? n : kMaxAhead) {}

  // The lines of the chunk that begins with element i.
  INLINE void fetch(int64_t i) const {
    if (i >= n_) return;
    const char* end = first_ + (i + kChunk < n_ ? i + kChunk : n_) * width_;
    for (const char* line = first_ + i * width_; line < end; line += kLine) __builtin_prefetch(line);
  }

 private:
  const char* first_ = nullptr;
  int64_t width_ = 0;  // bytes of an element
  int64_t n_ = 0;      // elements
};

// Several of them, for one pass.
template <int N>
struct AllAhead {
  Ahead arrays[N];

  INLINE void fetch(int64_t i) const {
    for (const Ahead& array : arrays) array.fetch(i);
  }
};

// body(begin) for each whole chunk of n elements, after the chunk of what comes later has been asked for. What is left
// comes last and on its own, so that the loop over whole chunks keeps its sums in registers.
template <class Later, class Body, class Rest>
INLINE void in_chunks(int64_t n, const Later& later, const Body& body, const Rest& rest) {
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    later.fetch(i);
    body(i);
  }
  if (i == n) return;
  later.fetch(i);
  rest(i);
}

// body(i, lane) for each element, lanes as in Sum.
template <class Later, class Body>
INLINE void in_lanes(int64_t n, const Later& later, const Body& body) {
  const auto chunk = [&](int64_t begin) INLINE_BODY {
    for (int64_t i = begin; i < begin + kChunk; i += kLanes) {
#pragma omp simd
      for (int k = 0; k < kLanes; ++k) body(i + k, k);
    }
  };
  const auto rest = [&](int64_t i) INLINE_BODY {
    for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
      for (int k = 0; k < kLanes; ++k) body(i + k, k);
    }
    for (int k = 0; i < n; ++i, ++k) body(i, k);
  };
  in_chunks(n, later, chunk, rest);
}

// body(i) for each element, in any order.
template <class Later, class Body>
INLINE void in_any_order(int64_t n, const Later& later, const Body& body) {
  const auto chunk = [&](int64_t begin) INLINE_BODY {
#pragma omp simd
    for (int64_t i = begin; i < begin + kChunk; ++i) body(i);
  };
  const auto rest = [&](int64_t begin) INLINE_BODY {
#pragma omp simd
    for (int64_t i = begin; i < n; ++i) body(i);
  };
  in_chunks(n, later, chunk, rest);
}

// Sum and squares of a row's parameters.
struct Moments {
  Sum sum, squares;

  INLINE void add(float x, int lane) {
    const double value = x;
    sum.lane[lane] += value;
    squares.lane[lane] += value * value;
  }
};

template <class T, class Hyper>
INLINE void write(const float* __restrict__ from, T* __restrict__ to, int64_t n, const Hyper& hyper,
                  const Moments& moments) {
  if (hyper.standardize_eps < 0.0f) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = cast<T>(from[i]);
  } else {
    const Standardizer s = standardizer(moments.sum.total(), moments.squares.total(), 1.0 / n, hyper);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = cast<T>((from[i] - s.mean) * s.inverse);
  }
}

// The copy of a unit, standardized where its group is; nothing where there is none.
template <class Rule>
INLINE void write_copy(const Step<Rule>& step, const Arrays<Rule>& tensor, const Unit& unit,
                       const typename Rule::Hyper& hyper, const Moments& moments) {
  if (!tensor.copy) return;
  const float* p = tensor.param + unit.offset;
  const int64_t n = unit.length;
  if (step.copy == Dtype::f32) write(p, static_cast<float*>(tensor.copy) + unit.offset, n, hyper, moments);
  if (step.copy == Dtype::f16) write(p, static_cast<c10::Half*>(tensor.copy) + unit.offset, n, hyper, moments);
  if (step.copy == Dtype::bf16) write(p, static_cast<c10::BFloat16*>(tensor.copy) + unit.offset, n, hyper, moments);
}

template <class Rule>
INLINE Ahead copy_ahead(const Step<Rule>& step, const Arrays<Rule>& tensor, const Unit& unit) {
  if (!tensor.copy) return Ahead();
  if (step.copy == Dtype::f32) return Ahead(static_cast<const float*>(tensor.copy) + unit.offset, unit.length);
  return Ahead(static_cast<const uint16_t*>(tensor.copy) + unit.offset, unit.length);
}

template <class Rule>
INLINE void copy_only(const Step<Rule>& step, const Arrays<Rule>* arrays, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit = step.units[u];
    const Arrays<Rule>& tensor = arrays[unit.tensor];
    const typename Rule::Hyper hyper = step.hyper[unit.group];
    const float* p = tensor.param + unit.offset;
    Moments moments;
    if (hyper.standardize_eps >= 0.0f) {
      in_lanes(unit.length, AllAhead<1>{{copy_ahead(step, tensor, unit)}},
               [&](int64_t i, int lane) INLINE_BODY { moments.add(p[i], lane); });
    }
    write_copy(step, tensor, unit, hyper, moments);
  }
}

template <class Rule, class Grad>
INLINE void run(const Step<Rule>& step, const Arrays<Rule>* arrays, double unscale, int64_t begin, int64_t end) {
  constexpr int kStates = Rule::kStates;
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit = step.units[u];
    const Arrays<Rule>& tensor = arrays[unit.tensor];
    const typename Rule::Hyper hyper = step.hyper[unit.group];
    const typename Rule::Rate rate = step.rate[unit.group * step.rate_stride];
    const int64_t n = unit.length;
    float* __restrict__ p = tensor.param + unit.offset;
    const Grad* __restrict__ g = static_cast<const Grad*>(tensor.grad) + unit.offset;
    float* state[kStates];
    AllAhead<kStates + 1> own;
    for (int k = 0; k < kStates; ++k) {
      state[k] = tensor.state[k] + unit.offset;
      own.arrays[k] = Ahead(state[k], n);
    }
    own.arrays[kStates] = copy_ahead(step, tensor, unit);
    AllAhead<2> next;
    if (u + 1 < end) {
      const Unit after = step.units[u + 1];
      next.arrays[0] = Ahead(arrays[after.tensor].param + after.offset, after.length);
      next.arrays[1] = Ahead(static_cast<const Grad*>(arrays[after.tensor].grad) + after.offset, after.length);
    }
    const auto element = [&](int64_t i, const auto& transform) INLINE_BODY {
      float values[kStates];
      for (int k = 0; k < kStates; ++k) values[k] = state[k][i];
      update<Rule>(p[i], values, static_cast<float>(g[i]), transform, hyper, rate);
      for (int k = 0; k < kStates; ++k) state[k][i] = values[k];
    };

    Moments moments;
    Factors factors{static_cast<float>(unscale), 1.0f, false};
    if (hyper.standardize_eps >= 0.0f) {
      Sum sp, spp, sg, sgg, sgp;
      in_lanes(n, own, [&](int64_t i, int k) INLINE_BODY {
        const double x = p[i], y = static_cast<float>(g[i]);
        sp.lane[k] += x;
        spp.lane[k] += x * x;
        sg.lane[k] += y;
        sgg.lane[k] += y * y;
        sgp.lane[k] += x * y;
      });
      const Sums sums{sp.total(), spp.total(), sg.total(), sgg.total(), sgp.total()};
      const Transform t = transform_of(sums, 1.0 / n, unscale, hyper);
      factors = t.factors;
      if (tensor.copy) {
        in_lanes(n, next, [&](int64_t i, int k) INLINE_BODY {
          element(i, t);
          moments.add(p[i], k);
        });
      } else {
        in_any_order(n, next, [&](int64_t i) INLINE_BODY { element(i, t); });
      }
    } else {
      if (hyper.clipping >= 0.0f) {
        Sum spp, sgg;
        in_lanes(n, own, [&](int64_t i, int k) INLINE_BODY {
          const double x = p[i], y = static_cast<float>(g[i]);
          spp.lane[k] += x * x;
          sgg.lane[k] += y * y;
        });
        factors = clip_factors(spp.total(), sgg.total(), unscale, hyper);
      }
      in_any_order(n, next, [&](int64_t i) INLINE_BODY { element(i, factors); });
    }
    if (step.clipped && factors.clipped) ++step.clipped[u];
    write_copy(step, tensor, unit, hyper, moments);
  }
}

// First unit of each of `parts` runs of about equally many elements; `parts + 1` entries.
inline std::vector<int64_t> split_by_elements(const Unit* units, int64_t count, int parts) {
  int64_t total = 0;
  for (int64_t u = 0; u < count; ++u) total += units[u].length;
  std::vector<int64_t> starts(parts + 1, count);
  int64_t seen = 0;
  int part = 0;
  for (int64_t u = 0; u < count; ++u) {
    while (part < parts && seen >= total * part / parts) starts[part++] = u;
    seen += units[u].length;
  }
  return starts;
}

// part(unscale, begin, end) for each thread's units.
template <class Rule, class Part>
void in_threads(const Step<Rule>& step, const Part& part) {
  if (step.found_inf && *step.found_inf != 0.0f) return;
  const double unscale = step.grad_scale ? 1.0 / static_cast<double>(*step.grad_scale) : 1.0;
  const int threads = at::get_num_threads();
  const std::vector<int64_t> starts = split_by_elements(step.units, step.count, threads);
  at::parallel_for(0, threads, 1,
                   [&](int64_t first, int64_t last) { part(unscale, starts[first], starts[last]); });
  if (step.clipped) ++step.clipped[step.count];
}

}  // namespace
}  // namespace boosterbit
