// AGC-SGD on the CPU: each row is read for its norms, and updated while it is still in the cache.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>
#include <vector>

#include "api.h"
#include "scalar.h"

// One source, compiled for plain x86-64 and for AVX2; the loader picks. No -march=native: the node that compiles and
// the nodes that train differ. AVX2 without FMA, so that the choice changes no rounding.
#if defined(__x86_64__) && defined(__linux__) && (defined(__GNUC__) || defined(__clang__))
#define FOR_EACH_CPU __attribute__((target_clones("default", "avx2")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE inline __attribute__((always_inline))

namespace boosterbit {
namespace {

// Double: squares of 1e30 do not overflow, squares of 1e-30 do not vanish, and a sum over 20,000 loses nothing.
template <class T>
INLINE double sum_of_squares(const T* x, int64_t n) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const double value = static_cast<float>(x[i]);
    sum += value * value;
  }
  return sum;
}

// The five sums that weight standardization needs; those of the gradient only with `Grad`.
template <class Grad>
INLINE Sums sums_of(const float* p, const Grad* g, int64_t n) {
  double sp = 0.0, spp = 0.0, sg = 0.0, sgg = 0.0, sgp = 0.0;
#pragma omp simd reduction(+ : sp, spp, sg, sgg, sgp)
  for (int64_t i = 0; i < n; ++i) {
    const double x = p[i], y = static_cast<float>(g[i]);
    sp += x;
    spp += x * x;
    sg += y;
    sgg += y * y;
    sgp += x * y;
  }
  return Sums{sp, spp, sg, sgg, sgp};
}

INLINE Standardizer standardizer_of(const float* p, int64_t n, const Hyper& hyper) {
  double sum = 0.0, squares = 0.0;
#pragma omp simd reduction(+ : sum, squares)
  for (int64_t i = 0; i < n; ++i) {
    const double x = p[i];
    sum += x;
    squares += x * x;
  }
  return standardizer(sum, squares, n, hyper);
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

template <class T>
INLINE void write(const float* from, T* to, int64_t n, const Hyper& hyper) {
  if (hyper.standardize_eps < 0.0f) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = cast<T>(from[i]);
  } else {
    const Standardizer s = standardizer_of(from, n, hyper);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] = cast<T>((from[i] - s.mean) * s.inverse);
  }
}

// The copy of a unit, standardized where its group is; nothing where there is none.
INLINE void write_copy(const Step& step, const Arrays& tensor, const Unit& unit, const Hyper& hyper) {
  if (!tensor.copy) return;
  const float* p = tensor.param + unit.offset;
  if (step.copy == Dtype::f32) write(p, static_cast<float*>(tensor.copy) + unit.offset, unit.length, hyper);
  if (step.copy == Dtype::f16) write(p, static_cast<c10::Half*>(tensor.copy) + unit.offset, unit.length, hyper);
  if (step.copy == Dtype::bf16) write(p, static_cast<c10::BFloat16*>(tensor.copy) + unit.offset, unit.length, hyper);
}

INLINE void copy_only(const Step& step, const Arrays* arrays, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    write_copy(step, arrays[step.units[u].tensor], step.units[u], step.hyper[step.units[u].group]);
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

    if (hyper.standardize_eps >= 0.0f) {
      const Transform t = transform_of(sums_of(p, g, n), n, unscale, hyper);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) update(p[i], m[i], static_cast<float>(g[i]), t, hyper, lr);
    } else {
      Factors factors{static_cast<float>(unscale), 1.0f};
      if (hyper.clipping >= 0.0f) factors = clip_factors(sum_of_squares(p, n), sum_of_squares(g, n), unscale, hyper);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) update(p[i], m[i], static_cast<float>(g[i]), factors, hyper, lr);
    }
    write_copy(step, tensor, unit, hyper);
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
    const int64_t begin = starts[first], end = starts[last];
    switch (step.grad) {
      case Dtype::f16: agc_sgd_f16(step, arrays, unscale, begin, end); break;
      case Dtype::none: agc_sgd_none(step, arrays, begin, end); break;
      case Dtype::bf16: agc_sgd_bf16(step, arrays, unscale, begin, end); break;
      default: agc_sgd_f32(step, arrays, unscale, begin, end);
    }
  });
}

}  // namespace boosterbit
