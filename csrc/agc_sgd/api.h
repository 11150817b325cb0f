// What one step of AGC-SGD is told, and the launchers of its two kernels. Plain types only: the CUDA file includes
// this header and no torch header.
#pragma once

#include <cstdint>

namespace boosterbit {

enum class Dtype : int32_t { none, f32, f16, bf16 };

// One row of the unit table: `length` contiguous elements whose norms are taken together. Layout of an int64 row.
struct Unit {
  int64_t offset;  // first element, counted from the start of its tensor
  int64_t length;  // elements; never 0
  int64_t group;   // row of the hyper-parameter table
  int64_t tensor;  // which tensor of the call; 0 for flat storage
};
constexpr int kUnitColumns = 4;

// One row of the hyper-parameter table. Layout of a float32 row.
struct Hyper {
  float momentum;
  float weight_decay;
  float clipping;         // negative: this group is not clipped
  float eps;              // lower bound of a parameter norm in the clipping rule
  float nesterov;         // 0 or 1
  float standardize_eps;  // negative: not standardized; else gradients are of, and copies hold, standardized rows
};
constexpr int kHyperColumns = 6;

// Storage of one tensor. Strides play no part: elements are numbered by their place in memory.
struct Arrays {
  float* param;
  const void* grad;
  float* momentum;
  void* copy;  // null without a copy of the new parameters
};

// One step. All pointers except `arrays` are on the device that runs the step.
struct Step {
  const Unit* units;
  int64_t count;
  const float* lr;    // one value, or one per group
  int64_t lr_stride;  // 0 or 1
  const Hyper* hyper;
  const float* grad_scale;  // null, or what the gradients must be divided by
  const float* found_inf;   // null, or non-zero: nothing is written
  Dtype grad;               // none: nothing is updated, only the copy is written
  Dtype copy;
};

void agc_sgd_cpu(const Step& step, const Arrays* arrays);

// Tensors of one launch on a GPU: their addresses are its arguments, of which 32,764 bytes are allowed.
constexpr int kMaxTensors = 960;

struct ClassCounts;

// One launch on `stream` (a cudaStream_t) of the current device. The units are sorted by size class. Returns null, or
// what CUDA says went wrong.
const char* agc_sgd_cuda(const Step& step, const Arrays* arrays, int tensors, const ClassCounts& classes, void* stream);

}  // namespace boosterbit
