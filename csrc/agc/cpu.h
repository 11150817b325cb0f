// A step on the CPU, for any rule: each row is read for its norms, and updated while it is still in the cache.
#pragma once

#include <ATen/Parallel.h>

#include <type_traits>
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
class Ahead {
 public:
  Ahead() = default;
  template <class T>
  INLINE Ahead(const T* first, int64_t n)
      : first_(reinterpret_cast<const char*>(first)), width_(sizeof(T)), n_(n < kMaxAhead ? n : kMaxAhead) {}

  // The lines of the chunk that begins with element i. Into the second-level cache: fills of the first that wait for
  // memory would hold up what this pass reads.
  INLINE void fetch(int64_t i) const {
    if (i >= n_) return;
    const char* end = first_ + (i + kChunk < n_ ? i + kChunk : n_) * width_;
    for (const char* line = first_ + i * width_; line < end; line += kLine) __builtin_prefetch(line, 0, 2);
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

// body(begin, end) for each chunk of n elements, after the chunk of what comes later has been asked for. What is left
// comes last and on its own, so that the loop over whole chunks keeps its sums in registers.
template <class Later, class Body>
INLINE void in_chunks(int64_t n, const Later& later, const Body& body) {
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    later.fetch(i);
    body(i, i + kChunk);
  }
  if (i == n) return;
  later.fetch(i);
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

// Sum and squares of a row's parameters.
struct Moments {
  Sum sum, squares;

  template <class Processor>
  INLINE void add(int k, float x) {
    sum.add(k, x);
    squares.add_product<Processor>(k, x, x);
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

template <class Processor, class Rule>
INLINE void copy_only(const Step<Rule>& step, const Arrays<Rule>* arrays, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit = step.units[u];
    const Arrays<Rule>& tensor = arrays[unit.tensor];
    const typename Rule::Hyper hyper = step.hyper[unit.group];
    const float* p = tensor.param + unit.offset;
    Moments moments;
    if (hyper.standardize_eps >= 0.0f) {
      in_lanes(unit.length, AllAhead<1>{{copy_ahead(step, tensor, unit)}},
               [&](int64_t i, int lane) INLINE_BODY { moments.add<Processor>(lane, p[i]); });
    }
    write_copy(step, tensor, unit, hyper, moments);
  }
}

template <class Processor, class Grad, class Rule>
INLINE void update_units(const Step<Rule>& step, const Arrays<Rule>* arrays, double unscale, int64_t begin,
                         int64_t end) {
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
      in_lanes_with(g, n, own, [&](int64_t i, int k, float grad) INLINE_BODY {
        const double x = p[i], y = grad;
        sp.add(k, x);
        spp.add_product<Processor>(k, x, x);
        sg.add(k, y);
        sgg.add_product<Processor>(k, y, y);
        sgp.add_product<Processor>(k, x, y);
      });
      const Sums sums{sp.total(), spp.total(), sg.total(), sgg.total(), sgp.total()};
      const Transform t = transform_of(sums, 1.0 / n, unscale, hyper);
      factors = t.factors;
      if (tensor.copy) {
        const auto update = [&](int64_t i) INLINE_BODY { element(i, t); };
        const auto sum = [&](int64_t i, int k) INLINE_BODY { moments.add<Processor>(k, p[i]); };
        in_any_order_then_lanes(n, next, update, sum);
      } else {
        in_any_order(n, next, [&](int64_t i) INLINE_BODY { element(i, t); });
      }
    } else {
      if (hyper.clipping >= 0.0f) {
        Sum spp, sgg;
        in_lanes_with(g, n, own, [&](int64_t i, int k, float grad) INLINE_BODY {
          const double x = p[i], y = grad;
          spp.add_product<Processor>(k, x, x);
          sgg.add_product<Processor>(k, y, y);
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

// The units from `begin` to `end`.
template <class Rule>
void step_part(const Step<Rule>& step, const Arrays<Rule>* arrays, double unscale, int64_t begin, int64_t end) {
  const auto update = [&](auto grad) {
    on_this_processor([&](auto processor) INLINE_BODY {
      update_units<decltype(processor), decltype(grad)>(step, arrays, unscale, begin, end);
    });
  };
  switch (step.grad) {
    case Dtype::f16: return update(c10::Half());
    case Dtype::bf16: return update(c10::BFloat16());
    case Dtype::f32: return update(float());
    default: on_this_processor([&](auto processor) INLINE_BODY {
      copy_only<decltype(processor)>(step, arrays, begin, end);
    });
  }
}

template <class Rule>
void step_cpu(const Step<Rule>& step, const Arrays<Rule>* arrays) {
  if (step.found_inf && *step.found_inf != 0.0f) return;
  const double unscale = step.grad_scale ? 1.0 / static_cast<double>(*step.grad_scale) : 1.0;
  const int threads = at::get_num_threads();
  const std::vector<int64_t> starts = split_by_elements(step.units, step.count, threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    step_part(step, arrays, unscale, starts[first], starts[last]);
  });
  if (step.clipped) ++step.clipped[step.count];
}

}  // namespace
}  // namespace boosterbit
