// What a group norm with ReLU is told, and its CPU launchers. Plain types only.
#pragma once

#include <cstdint>

namespace boosterbit {

enum class NormDtype : int32_t { f32, f16, bf16 };

// Activations of `batch` samples with `channels` channels of `pixels` elements each, in `groups` groups.
struct NormShape {
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t groups;
  bool channels_last;  // memory is (batch, pixels, channels); else (batch, channels, pixels)
  NormDtype dtype;     // of all activations and their gradients
};

struct NormForward {
  NormShape shape;
  const void* x;
  const float* gamma;  // (channels)
  const float* beta;   // (channels)
  double eps;
  void* y;
  float* mean;     // (batch, groups)
  float* inverse;  // (batch, groups): 1 / sqrt(biased variance + eps)
};

struct NormBackward {
  NormShape shape;
  const void* grad;  // of y
  const void* x;
  const float* gamma;
  const float* beta;
  const float* mean;
  const float* inverse;
  void* grad_x;
  float* gamma_parts;  // (batch, channels): the gradients of gamma and beta, sample by sample
  float* beta_parts;
  float* grad_gamma;  // (channels)
  float* grad_beta;
};

void group_norm_relu_cpu(const NormForward& call);
void group_norm_relu_backward_cpu(const NormBackward& call);

}  // namespace boosterbit
