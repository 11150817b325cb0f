// The scalar arithmetic of group norm with ReLU.
#pragma once

#include <cmath>
#include <cstdint>

#include "../shared/types.h"

namespace boosterbit {

// Count, mean, and sum of squared deviations from it.
struct Moments {
  double count, mean, squares;
};

// Moments of two sets together (Chan, Golub, LeVeque 1979): differences of means only, so a large mean cancels nothing.
BOOSTERBIT_MATH Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0.0) return a;
  const double apart = b.mean - a.mean;
  return Moments{count, a.mean + apart * (b.count / count),
                 a.squares + b.squares + apart * apart * (a.count * b.count / count)};
}

// Adds `count` elements to `m`, given the sums of their differences from `shift` and of those squared. Nothing cancels
// where `shift` is near the mean of `m`, and `m` is not much smaller: what the new elements lie away from it is then
// variance of the whole.
BOOSTERBIT_MATH Moments add_shifted(const Moments& m, float shift, double count, double sum, double squares) {
  const double total = m.count + count, apart = m.mean - shift;
  const double all = m.count * apart + sum;
  const double left = m.squares + m.count * apart * apart + squares - all * (all / total);
  return Moments{total, shift + all / total, left > 0.0 ? left : 0.0};
}

BOOSTERBIT_MATH float inverse_deviation(const Moments& m, double eps) {
  return static_cast<float>(1.0 / sqrt((m.count > 0.0 ? m.squares / m.count : 0.0) + eps));
}

// The norm before its ReLU; `scale` is gamma / sigma. Forward and backward both ask here, so they see the same sign.
// The mean is taken off first: folded into beta, it would cancel where it is large.
BOOSTERBIT_MATH float normalized(float x, float mean, float scale, float beta) { return (x - mean) * scale + beta; }

// A NaN stays one, as in torch.
BOOSTERBIT_MATH float relu(float z) { return z < 0.0f ? 0.0f : z; }
BOOSTERBIT_MATH float relu_gradient(float z, float grad) { return z <= 0.0f ? 0.0f : grad; }

// With g the gradient behind the ReLU, xhat = (x - mean) / sigma, and averages over the group:
//   dx = (gamma g - avg(gamma g) - xhat avg(gamma g xhat)) / sigma = scale g - offset - slope (x - mean).
struct InputGradient {
  float offset, slope;
};

// From the sums of gamma g and of gamma g (x - mean) over the `count` elements of a group.
BOOSTERBIT_MATH InputGradient input_gradient(double sum, double sum_x, double count, float inverse) {
  const double r = inverse;
  return InputGradient{static_cast<float>(r * sum / count), static_cast<float>(r * r * r * sum_x / count)};
}

}  // namespace boosterbit
