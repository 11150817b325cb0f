// The CUDA kernels of AdamW behind AGC on a CPU: the count of steps, then the step.
#include "emulated_agc.h"

#include "agc_adamw/count.h"

namespace boosterbit {

template <class Rule>
const char* emulate_two(const Launch& launch, const float* lr, float* steps, int64_t groups) {
  std::vector<typename Rule::Rate> rates(groups);
  const Count<Rule> count{steps, lr, 0, static_cast<const typename Rule::Hyper*>(launch.hyper), groups,
                          launch.found_inf, rates.data()};
  device::start(launch.seed);
  device::run_blocks(1, kCountThreads, 0, [&](void*) { count_step(count); });
  if (!device::machine.error.empty()) return device::machine.error.c_str();
  return emulate<Rule>(launch, rates.data(), 1);
}

}  // namespace boosterbit

extern "C" const char* emulate(const boosterbit::Launch* launch, const float* lr, float* steps, int64_t groups,
                               int averages) {
  using namespace boosterbit;
  if (averages) return emulate_two<AgcAdamW<true>>(*launch, lr, steps, groups);
  return emulate_two<AgcAdamW<false>>(*launch, lr, steps, groups);
}
