// The scalar arithmetic of AGC-SGD, shared by the CPU and the CUDA kernel.
#pragma once

#include <cmath>

#include "agc_sgd.h"

#if defined(__CUDACC__)
#define BOOSTERBIT_MATH __host__ __device__ __forceinline__
#else
#define BOOSTERBIT_MATH inline __attribute__((always_inline))
#endif

namespace boosterbit {

// What a row's gradient is multiplied by: first one, then the other. Two, because a huge gradient is clipped by a
// number that float cannot hold.
struct Factors {
  float first;
  float second;
};

// Scale of a unit with parameter norm² `param_sq` and (scaled) gradient norm² `grad_sq`:
//   max_norm = clipping * max(param_norm, eps);  grad *= max_norm / max(grad_norm, 1e-6) where grad_norm > max_norm.
// Squared norms are compared, so that the usual row, which is not clipped, needs no root.
BOOSTERBIT_MATH Factors clip_factors(double param_sq, double grad_sq, double unscale, const Hyper& hyper) {
  Factors factors{static_cast<float>(unscale), 1.0f};
  if (hyper.clipping < 0.0f) return factors;
  const double eps = hyper.eps, clipping = hyper.clipping;
  const double max_sq = clipping * clipping * (param_sq > eps * eps ? param_sq : eps * eps);
  const double norm_sq = grad_sq * (unscale * unscale);
  if (norm_sq > max_sq) {
    double factor = sqrt(max_sq / (norm_sq > 1e-12 ? norm_sq : 1e-12));
    if (factor < 0x1p-64) {
      factors.first *= 0x1p-64f;
      factor *= 0x1p64;
    }
    factors.second = static_cast<float>(factor);
  }
  return factors;
}

// One element: decay, momentum, update. torch.optim.SGD with dampening 0, whose first step (no buffer yet) is this
// one with a momentum of zeros.
BOOSTERBIT_MATH void update(float& param, float& momentum, float grad, Factors factors, const Hyper& hyper, float lr) {
  const float descent = grad * factors.first * factors.second + hyper.weight_decay * param;
  momentum = hyper.momentum * momentum + descent;
  param -= lr * (hyper.nesterov != 0.0f ? descent + hyper.momentum * momentum : momentum);
}

}  // namespace boosterbit
