// The CUDA kernel of an optimizer behind AGC on a CPU, for any rule.
#pragma once

#include "emulator.h"

#include "agc/kernel.h"

namespace boosterbit {

template <class Rule, class Grad>
void run_grid(const Step<Rule>& step, const Arrays<Rule>* arrays, const Schedule& schedule, int blocks) {
  device::run_blocks(blocks, schedule.warps * kLanes, Shared<Rule>::template bytes<Grad>(schedule.warps),
                     [&](void* memory) {
                       run_block<Grad>(step, schedule, arrays, *static_cast<Shared<Rule>*>(memory));
                     });
}

// What a launch is told besides its rule's rates.
struct Launch {
  const int64_t* units;
  const void* hyper;
  const float* grad_scale;
  const float* found_inf;
  int grad, copy;
  const void* arrays;
  const int64_t* classes;
  int32_t* clipped;
  int blocks, seed, most_warps;
};

// One launch of `blocks` blocks of at most `most_warps` warps. `classes`: kClasses counts. Returns null, or what went
// wrong.
template <class Rule>
const char* emulate(const Launch& x, const typename Rule::Rate* rate, int64_t rate_stride) {
  ClassCounts counts;
  std::copy(x.classes, x.classes + kClasses, counts.count);
  int64_t count = 0;
  for (const int64_t of_class : counts.count) count += of_class;
  const Step<Rule> step{reinterpret_cast<const Unit*>(x.units),
                        count,
                        rate,
                        rate_stride,
                        static_cast<const typename Rule::Hyper*>(x.hyper),
                        x.grad_scale,
                        x.found_inf,
                        static_cast<Dtype>(x.grad),
                        static_cast<Dtype>(x.copy),
                        x.clipped};
  const auto* tensors = static_cast<const Arrays<Rule>*>(x.arrays);
  device::start(x.seed);
  for (const Unit* unit = step.units; step.grad != Dtype::none && unit != step.units + count; ++unit) {
    const auto reach = [&](const void* array, int size) {
      const char* begin = static_cast<const char*>(array) + unit->offset * size;
      device::machine.regions.emplace_back(begin, begin + unit->length * size);
    };
    reach(tensors[unit->tensor].param, 4);
    for (const float* state : tensors[unit->tensor].state) reach(state, 4);
    reach(tensors[unit->tensor].grad, step.grad == Dtype::f32 ? 4 : 2);
  }
  const Schedule schedule = schedule_of(counts, x.most_warps);
  switch (step.grad) {
    case Dtype::none: run_grid<Rule, NoGrad>(step, tensors, schedule, x.blocks); break;
    case Dtype::f32: run_grid<Rule, float>(step, tensors, schedule, x.blocks); break;
    case Dtype::f16: run_grid<Rule, c10::Half>(step, tensors, schedule, x.blocks); break;
    case Dtype::bf16: run_grid<Rule, c10::BFloat16>(step, tensors, schedule, x.blocks); break;
  }
  return device::machine.error.empty() ? nullptr : device::machine.error.c_str();
}

}  // namespace boosterbit

// Bytes that the last launch prefetched.
extern "C" int64_t prefetched() { return boosterbit::device::machine.prefetched; }
