// Sums over a row on the CPU, in one order whatever the width of a vector.
#pragma once

#include <cstdint>

#include "../shared/cpu.h"
#include "scalar.h"

#if defined(ON_AVX2)
#include <immintrin.h>
#endif

namespace boosterbit {
namespace {

constexpr int kLanes = 8;

// Element i goes to lane i % kLanes, and the lanes are added in pairs. Double: squares of 1e30 do not overflow, squares
// of 1e-30 do not vanish, and a sum over 20,000 loses nothing.
struct Sum {
  double lane[kLanes] = {};

  INLINE void add(int k, double x) { lane[k] += x; }

  // Of x and y that were floats: 48 of 53 bits hold the product, so that it is rounded once, fused or not.
  template <class Processor>
  INLINE void add_product(int k, double x, double y) {
    lane[k] = Processor::kFused ? __builtin_fma(x, y, lane[k]) : lane[k] + x * y;
  }

  INLINE double total() const {
    const double* x = lane;
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
  }
};
static_assert(kLanes == 8, "Sum::total adds 8 lanes");

// Over a row's parameters.
struct Moments {
  Sum sum, squares;
};

// Over a row's parameters and gradients. Of a row that is not standardized only the squares are made.
struct PairSums {
  Sum p, g, pp, gg, gp;

  INLINE Sums totals() const { return Sums{p.total(), pp.total(), g.total(), gg.total(), gp.total()}; }
};

#if defined(ON_AVX2)
// All lanes in vectors of AVX2. Written out: of a loop the compiler makes vectors of eight floats and takes these in
// halves, which it could have loaded and converted in one; then sums take half as long again. With AVX-512, too, it
// takes vectors of this width.
struct AllLanes {
  __m256d low, high;

  ON_AVX2 explicit AllLanes(const float* x)
      : low(_mm256_cvtps_pd(_mm_loadu_ps(x))), high(_mm256_cvtps_pd(_mm_loadu_ps(x + 4))) {}
  ON_AVX2 explicit AllLanes(const Sum& sum) : low(_mm256_loadu_pd(sum.lane)), high(_mm256_loadu_pd(sum.lane + 4)) {}

  ON_AVX2 void add(const AllLanes& x) {
    low = _mm256_add_pd(low, x.low);
    high = _mm256_add_pd(high, x.high);
  }

  ON_AVX2 void add_product(const AllLanes& x, const AllLanes& y) {
    low = _mm256_fmadd_pd(x.low, y.low, low);
    high = _mm256_fmadd_pd(x.high, y.high, high);
  }

  ON_AVX2 void store(Sum& sum) const {
    _mm256_storeu_pd(sum.lane, low);
    _mm256_storeu_pd(sum.lane + 4, high);
  }
};

// n is a multiple of kLanes.
ON_AVX2 inline void add_vectors(const float* p, int64_t n, Moments& moments) {
  AllLanes sum(moments.sum), squares(moments.squares);
// Unrolled as a whole it needs more registers than there are.
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; i += kLanes) {
    const AllLanes x(p + i);
    sum.add(x);
    squares.add_product(x, x);
  }
  sum.store(moments.sum);
  squares.store(moments.squares);
}

template <bool standardized>
ON_AVX2 inline void add_vectors(const float* p, const float* g, int64_t n, PairSums& sums) {
  AllLanes sp(sums.p), sg(sums.g), pp(sums.pp), gg(sums.gg), gp(sums.gp);
// Unrolled as a whole it needs more registers than there are.
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; i += kLanes) {
    const AllLanes x(p + i), y(g + i);
    pp.add_product(x, x);
    gg.add_product(y, y);
    if (standardized) {
      sp.add(x);
      sg.add(y);
      gp.add_product(x, y);
    }
  }
  sp.store(sums.p);
  sg.store(sums.g);
  pp.store(sums.pp);
  gg.store(sums.gg);
  gp.store(sums.gp);
}
#endif

// body(i, lane) for n elements, in loops of which the compiler makes vectors.
template <class Body>
INLINE void in_lanes(int64_t begin, int64_t n, const Body& body) {
  int64_t i = begin;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) body(i + k, k);
  }
  for (int k = 0; k < n - i; ++k) body(i + k, k);
}

// Adds n elements; but for the last of a row n is a multiple of kLanes.
template <class Processor>
INLINE void add(const float* p, int64_t n, Moments& moments) {
  int64_t done = 0;
#if defined(ON_AVX2)
  if constexpr (Processor::kAvx2) {
    done = n / kLanes * kLanes;
    add_vectors(p, done, moments);
  }
#endif
  in_lanes(done, n, [&](int64_t i, int k) INLINE_BODY {
    moments.sum.add(k, p[i]);
    moments.squares.add_product<Processor>(k, p[i], p[i]);
  });
}

template <class Processor, bool standardized>
INLINE void add(const float* p, const float* g, int64_t n, PairSums& sums) {
  int64_t done = 0;
#if defined(ON_AVX2)
  if constexpr (Processor::kAvx2) {
    done = n / kLanes * kLanes;
    add_vectors<standardized>(p, g, done, sums);
  }
#endif
  in_lanes(done, n, [&](int64_t i, int k) INLINE_BODY {
    const double x = p[i], y = g[i];
    sums.pp.add_product<Processor>(k, x, x);
    sums.gg.add_product<Processor>(k, y, y);
    if (standardized) {
      sums.p.add(k, x);
      sums.g.add(k, y);
      sums.gp.add_product<Processor>(k, x, y);
    }
  });
}

}  // namespace
}  // namespace boosterbit
