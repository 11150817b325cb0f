// What one step of an optimizer behind AGC is told. Which optimizer, a rule says (agc_sgd/rule.h, agc_adamw/rule.h): the
// settings of its parameter groups, the arrays that it keeps for each parameter, and what it does with an element. Plain
// types only: CUDA files include this header and no torch header.
#pragma once

#include <cstdint>

#include "../shared/types.h"

namespace boosterbit {

// One row of the unit table: `length` contiguous elements whose norms are taken together. Layout of an int64 row.
struct Unit {
  int64_t offset;  // first element, counted from the start of its tensor
  int64_t length;  // elements; never 0
  int64_t group;   // row of the hyper-parameter table
  int64_t tensor;  // which tensor of the call; 0 for flat storage
};
constexpr int kUnitColumns = 4;

// Storage of one tensor. Strides play no part: elements are numbered by their place in memory.
template <class Rule>
struct Arrays {
  float* param;
  const void* grad;
  float* state[Rule::kStates];
  void* copy;  // null without a copy of the new parameters
};

// One step. All pointers are on the device that runs it.
template <class Rule>
struct Step {
  const Unit* units;
  int64_t count;
  const typename Rule::Rate* rate;  // one, or one per group
  int64_t rate_stride;              // 0 or 1
  const typename Rule::Hyper* hyper;
  const float* grad_scale;  // null, or what the gradients must be divided by
  const float* found_inf;   // null, or non-zero: nothing is written
  Dtype grad;               // none: nothing is updated, only the copy is written
  Dtype copy;
  int32_t* clipped;  // null, or `count` + 1 counters: how often each unit was clipped, and the steps
};

struct ClassCounts;

}  // namespace boosterbit
