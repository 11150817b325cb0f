// The scalar arithmetic of clipping and standardization, shared by the CPU and the CUDA kernel. `Hyper` is a rule's.
#pragma once

#include <cmath>

#include "step.h"

namespace boosterbit {

// What a row's gradient is multiplied by: first one, then the other. Two, because a huge gradient is clipped by a
// number that float cannot hold.
struct Factors {
  float first;
  float second;
  bool clipped;
};

// Scale of a unit with parameter norm² `param_sq` and (scaled) gradient norm² `grad_sq`:
//   max_norm = clipping * max(param_norm, eps);  grad *= max_norm / max(grad_norm, 1e-6) where grad_norm > max_norm.
// Squared norms are compared, so that the usual row, which is not clipped, needs no root.
template <class Hyper>
BOOSTERBIT_MATH Factors clip_factors(double param_sq, double grad_sq, double unscale, const Hyper& hyper) {
  Factors factors{static_cast<float>(unscale), 1.0f, false};
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
    factors.clipped = true;
  }
  return factors;
}

// Sums over a unit: of parameters and gradients, their squares and products.
struct Sums {
  double p, pp, g, gg, gp;
};

// Weight standardization of a row: (param - mean) * inverse.
struct Standardizer {
  float mean;
  float inverse;
};

// Of a row with the given sum and sum of squares, `per` being 1 / its length: zero mean, unit biased variance, as arXiv
// 1903.10520.
template <class Hyper>
BOOSTERBIT_MATH Standardizer standardizer(double sum, double squares, double per, const Hyper& hyper) {
  const double mean = sum * per, variance = squares * per - mean * mean;
  const double inverse = 1.0 / sqrt((variance > 0.0 ? variance : 0.0) + hyper.standardize_eps);
  return Standardizer{static_cast<float>(mean), static_cast<float>(inverse)};
}

// What becomes of a unit's gradient: ((grad - grad_mean) - slope * (param - mean)) * first * second.
struct Transform {
  float grad_mean;
  float slope;
  float mean;
  Factors factors;
};

// Unscaling, the backward pass of standardization where the group has it, and clipping, for a unit of 1 / `per` elements.
// With w = (p - mean(p)) r, r = 1 / sqrt(var(p) + eps), and g the gradient of w, the gradient of p is
//   r (g - mean(g) - w mean(g w)) = r ((g - mean(g)) - slope (p - mean(p))),  slope = r^2 cov(g, p),
// which has the squared norm r^2 (S(g, g) - 2 slope S(g, p) + slope^2 S(p, p)) with S the sums of centred products.
template <class Hyper>
BOOSTERBIT_MATH Transform transform_of(const Sums& s, double per, double unscale, const Hyper& hyper) {
  if (hyper.standardize_eps < 0.0f) return Transform{0.0f, 0.0f, 0.0f, clip_factors(s.pp, s.gg, unscale, hyper)};
  const double p_mean = s.p * per, g_mean = s.g * per;
  double pp = s.pp - s.p * p_mean;
  if (pp < 0.0) pp = 0.0;
  const double gg = s.gg - s.g * g_mean, gp = s.gp - s.g * p_mean;
  const double r = 1.0 / sqrt(pp * per + hyper.standardize_eps), slope = r * r * gp * per;
  double grad_sq = gg - 2.0 * slope * gp + slope * slope * pp;
  if (grad_sq < 0.0) grad_sq = 0.0;
  return Transform{static_cast<float>(g_mean), static_cast<float>(slope), static_cast<float>(p_mean),
                   clip_factors(s.pp, grad_sq, unscale * r, hyper)};
}

template <class Hyper>
BOOSTERBIT_MATH bool needs_sums(const Hyper& hyper) {
  return hyper.clipping >= 0.0f || hyper.standardize_eps >= 0.0f;
}

// One element of a unit that is not standardized, and of one that is: `grad` is then of the standardized weight.
template <class Rule>
BOOSTERBIT_MATH void update(float& param, float (&state)[Rule::kStates], float grad, Factors factors,
                            const typename Rule::Hyper& hyper, const typename Rule::Rate& rate) {
  Rule::update(param, state, grad * factors.first * factors.second, hyper, rate);
}

template <class Rule>
BOOSTERBIT_MATH void update(float& param, float (&state)[Rule::kStates], float grad, const Transform& t,
                            const typename Rule::Hyper& hyper, const typename Rule::Rate& rate) {
  update<Rule>(param, state, (grad - t.grad_mean) - t.slope * (param - t.mean), t.factors, hyper, rate);
}

}  // namespace boosterbit
