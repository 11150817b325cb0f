// AGC-SGD on the CPU: each row is read for its norms, and updated while it is still in the cache.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>
#include <vector>

#include "api.h"
#include "scalar.h"

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

// body(begin) for each whole chunk of n elements, after the chunk of what comes later has been asked for. What is left
// comes last and on its own, so that the loop over whole chunks keeps its sums in registers.
template <class Body, class Rest>
INLINE void in_chunks(int64_t n, const Ahead& first, const Ahead& second, const Body& body, const Rest& rest) {
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    first.fetch(i);
    second.fetch(i);
    body(i);
  }
  if (i == n) return;
  first.fetch(i);
  second.fetch(i);
  rest(i);
}

// body(i, lane) for each element, lanes as in Sum.
template <class Body>
INLINE void in_lanes(int64_t n, const Ahead& first, const Ahead& second, const Body& body) {
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
  in_chunks(n, first, second, chunk, rest);
}

// body(i) for each element, in any order.
template <class Body>
INLINE void in_any_order(int64_t n, const Ahead& first, const Ahead& second, const Body& body) {
  const auto chunk = [&](int64_t begin) INLINE_BODY {
#pragma omp simd
    for (int64_t i = begin; i < begin + kChunk; ++i) body(i);
  };
  const auto rest = [&](int64_t begin) INLINE_BODY {
#pragma omp simd
    for (int64_t i = begin; i < n; ++i) body(i);
  };
  in_chunks(n, first, second, chunk, rest);
}

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

// Sum and squares of a row's parameters.
struct Moments {
  Sum sum, squares;

  INLINE void add(float x, int lane) {
    const double value = x;
    sum.lane[lane] += value;
    squares.lane[lane] += value * value;
  }
};

template <class T>
INLINE void write(const float* __restrict__ from, T* __restrict__ to, int64_t n, const Hyper& hyper,
                  const Moments& moments) {
  if (hyper.standardize_eps < 0.0f) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = cast<T>(from[i]);
  } else {
    const Standardizer s = standardizer(moments.sum.total(), moments.squares.total(), n, hyper);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = cast<T>((from[i] - s.mean) * s.inverse);
  }
}

// The copy of a unit, standardized where its group is; nothing where there is none.
INLINE void write_copy(const Step& step, const Arrays& tensor, const Unit& unit, const Hyper& hyper,
                       const Moments& moments) {
  if (!tensor.copy) return;
  const float* p = tensor.param + unit.offset;
  const int64_t n = unit.length;
  if (step.copy == Dtype::f32) write(p, static_cast<float*>(tensor.copy) + unit.offset, n, hyper, moments);
  if (step.copy == Dtype::f16) write(p, static_cast<c10::Half*>(tensor.copy) + unit.offset, n, hyper, moments);
  if (step.copy == Dtype::bf16) write(p, static_cast<c10::BFloat16*>(tensor.copy) + unit.offset, n, hyper, moments);
}

INLINE Ahead copy_ahead(const Step& step, const Arrays& tensor, const Unit& unit) {
  if (!tensor.copy) return Ahead();
  if (step.copy == Dtype::f32) return Ahead(static_cast<const float*>(tensor.copy) + unit.offset, unit.length);
  return Ahead(static_cast<const uint16_t*>(tensor.copy) + unit.offset, unit.length);
}

INLINE void copy_only(const Step& step, const Arrays* arrays, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit = step.units[u];
    const Arrays& tensor = arrays[unit.tensor];
    const Hyper hyper = step.hyper[unit.group];
    const float* p = tensor.param + unit.offset;
    Moments moments;
    if (hyper.standardize_eps >= 0.0f) {
      in_lanes(unit.length, copy_ahead(step, tensor, unit), Ahead(),
               [&](int64_t i, int lane) INLINE_BODY { moments.add(p[i], lane); });
    }
    write_copy(step, tensor, unit, hyper, moments);
  }
}

template <class Grad>
INLINE void run(const Step& step, const Arrays* arrays, double unscale, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit = step.units[u];
    const Arrays& tensor = arrays[unit.tensor];
    const Hyper hyper = step.hyper[unit.group];
    const float lr = step.lr[unit.group * step.lr_stride];
    const int64_t n = unit.length;
    float* __restrict__ p = tensor.param + unit.offset;
    float* __restrict__ m = tensor.momentum + unit.offset;
    const Grad* __restrict__ g = static_cast<const Grad*>(tensor.grad) + unit.offset;
    const Ahead momentum(m, n), copy = copy_ahead(step, tensor, unit);
    Ahead next_p, next_g;
    if (u + 1 < end) {
      const Unit next = step.units[u + 1];
      next_p = Ahead(arrays[next.tensor].param + next.offset, next.length);
      next_g = Ahead(static_cast<const Grad*>(arrays[next.tensor].grad) + next.offset, next.length);
    }

    Moments moments;
    if (hyper.standardize_eps >= 0.0f) {
      Sum sp, spp, sg, sgg, sgp;
      in_lanes(n, momentum, copy, [&](int64_t i, int k) INLINE_BODY {
        const double x = p[i], y = static_cast<float>(g[i]);
        sp.lane[k] += x;
        spp.lane[k] += x * x;
        sg.lane[k] += y;
        sgg.lane[k] += y * y;
        sgp.lane[k] += x * y;
      });
      const Sums sums{sp.total(), spp.total(), sg.total(), sgg.total(), sgp.total()};
      const Transform t = transform_of(sums, n, unscale, hyper);
      in_any_order(n, next_p, next_g, [&](int64_t i) INLINE_BODY {
        update(p[i], m[i], static_cast<float>(g[i]), t, hyper, lr);
      });
      if (tensor.copy) in_lanes(n, Ahead(), Ahead(), [&](int64_t i, int k) INLINE_BODY { moments.add(p[i], k); });
    } else {
      Factors factors{static_cast<float>(unscale), 1.0f};
      if (hyper.clipping >= 0.0f) {
        Sum spp, sgg;
        in_lanes(n, momentum, copy, [&](int64_t i, int k) INLINE_BODY {
          const double x = p[i], y = static_cast<float>(g[i]);
          spp.lane[k] += x * x;
          sgg.lane[k] += y * y;
        });
        factors = clip_factors(spp.total(), sgg.total(), unscale, hyper);
      }
      in_any_order(n, next_p, next_g, [&](int64_t i) INLINE_BODY {
        update(p[i], m[i], static_cast<float>(g[i]), factors, hyper, lr);
      });
    }
    write_copy(step, tensor, unit, hyper, moments);
  }
}

}  // namespace

FOR_EACH_CPU void agc_sgd_f32(const Step& step, const Arrays* arrays, double unscale, int64_t begin, int64_t end) {
  run<float>(step, arrays, unscale, begin, end);
}
FOR_EACH_CPU void agc_sgd_f16(const Step& step, const Arrays* arrays, double unscale, int64_t begin, int64_t end) {
  run<c10::Half>(step, arrays, unscale, begin, end);
}
FOR_EACH_CPU void agc_sgd_bf16(const Step& step, const Arrays* arrays, double unscale, int64_t begin, int64_t end) {
  run<c10::BFloat16>(step, arrays, unscale, begin, end);
}

FOR_EACH_CPU void agc_sgd_none(const Step& step, const Arrays* arrays, int64_t begin, int64_t end) {
  copy_only(step, arrays, begin, end);
}

// The units from `begin` to `end`.
void agc_sgd_part(const Step& step, const Arrays* arrays, double unscale, int64_t begin, int64_t end) {
  switch (step.grad) {
    case Dtype::f16: return agc_sgd_f16(step, arrays, unscale, begin, end);
    case Dtype::none: return agc_sgd_none(step, arrays, begin, end);
    case Dtype::bf16: return agc_sgd_bf16(step, arrays, unscale, begin, end);
    default: agc_sgd_f32(step, arrays, unscale, begin, end);
  }
}

// First unit of each of `parts` runs of about equally many elements; `parts + 1` entries.
std::vector<int64_t> split_by_elements(const Unit* units, int64_t count, int parts) {
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

void agc_sgd_cpu(const Step& step, const Arrays* arrays) {
  if (step.found_inf && *step.found_inf != 0.0f) return;
  const double unscale = step.grad_scale ? 1.0 / static_cast<double>(*step.grad_scale) : 1.0;
  const int threads = at::get_num_threads();
  const std::vector<int64_t> starts = split_by_elements(step.units, step.count, threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    agc_sgd_part(step, arrays, unscale, starts[first], starts[last]);
  });
}

}  // namespace boosterbit
