// AdamW behind AGC on the CPU.
#include "../agc/cpu.h"
#include "rule.h"

namespace boosterbit {

template <bool Ema>
void agc_adamw_cpu(const Step<AgcAdamW<Ema>>& step, const Arrays<AgcAdamW<Ema>>* arrays) {
  step_cpu(step, arrays);
}

template void agc_adamw_cpu<false>(const Step<AgcAdamW<false>>& step, const Arrays<AgcAdamW<false>>* arrays);
template void agc_adamw_cpu<true>(const Step<AgcAdamW<true>>& step, const Arrays<AgcAdamW<true>>* arrays);

}  // namespace boosterbit
