// The count of steps on a GPU. Over the primitives that kernel.h is written in, which the includer includes before.
#pragma once

#include "rule.h"

namespace boosterbit {

constexpr int kCountThreads = 32;

// One block of kCountThreads.
template <class Rule>
DEVICE void count_step(const Count<Rule>& count) {
  if (count.found_inf && *count.found_inf != 0.0f) return;
  const float steps = *count.steps + 1.0f;
  for (int64_t group = device::thread_index(); group < count.groups; group += kCountThreads)
    count.rates[group] = Rule::rate_of(count.hyper[group], count.lr[group * count.lr_stride], steps);
  device::warp_wait();  // all have read the count
  if (device::thread_index() == 0) *count.steps = steps;
}

}  // namespace boosterbit
