// What a group norm with ReLU is told, and its launchers. Plain types only: the CUDA file includes this header and no
// torch header.
#pragma once

#include <cstdint>

#include "../shared/types.h"

namespace boosterbit {

// Activations of `batch` samples with `channels` channels of `pixels` elements each, in `groups` groups.
struct NormShape {
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t groups;
  bool channels_last;  // memory is (batch, pixels, channels); else (batch, channels, pixels)
  Dtype dtype;         // of all activations and their gradients
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
  const void* shortcut;  // the gradient that x has from elsewhere, added to the norm's; or null
  void* grad_x;
  float* gamma_parts;  // (batch, channels), on a GPU (batch * parts, channels): the gradients of gamma and beta by sample
  float* beta_parts;
  float* grad_gamma;  // (channels)
  float* grad_beta;
};

void group_norm_relu_cpu(const NormForward& call);
void group_norm_relu_backward_cpu(const NormBackward& call);

// A GPU: its multiprocessors, and the bytes of shared memory that a block may have, and that all blocks of one have.
struct NormDevice {
  int64_t processors;
  int64_t shared_block;
  int64_t shared_processor;
};

struct NormPlan;

// Launches on `stream` (a cudaStream_t) of the current device, by a plan for it. `work`: two doubles for each group of
// each sample and each part of a tile; null where there is one part. They return null, or what CUDA says went wrong.
const char* norm_device(NormDevice& found);
const char* group_norm_relu_cuda(const NormForward& call, const NormPlan& plan, double* work, void* stream);
const char* group_norm_relu_backward_cuda(const NormBackward& call, const NormPlan& plan, double* work, void* stream);

}  // namespace boosterbit
