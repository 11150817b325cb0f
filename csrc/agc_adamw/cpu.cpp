// AdamW behind AGC on the CPU.
#include "../agc/cpu.h"
#include "rule.h"

namespace boosterbit {

// A function for each kind of gradient, with a moving average and without.
#define PART(name, ema, Grad)                                                                                        \
  FOR_EACH_CPU void name(const Step<AgcAdamW<ema>>& step, const Arrays<AgcAdamW<ema>>* arrays, double unscale,        \
                         int64_t begin, int64_t end) {                                                               \
    run<AgcAdamW<ema>, Grad>(step, arrays, unscale, begin, end);                                                      \
  }
PART(agc_adamw_f32, false, float)
PART(agc_adamw_f16, false, c10::Half)
PART(agc_adamw_bf16, false, c10::BFloat16)
PART(agc_adamw_ema_f32, true, float)
PART(agc_adamw_ema_f16, true, c10::Half)
PART(agc_adamw_ema_bf16, true, c10::BFloat16)
#undef PART

// The units from `begin` to `end`.
void agc_adamw_part(const Step<AgcAdamW<false>>& step, const Arrays<AgcAdamW<false>>* arrays, double unscale,
                    int64_t begin, int64_t end) {
  switch (step.grad) {
    case Dtype::f16: return agc_adamw_f16(step, arrays, unscale, begin, end);
    case Dtype::bf16: return agc_adamw_bf16(step, arrays, unscale, begin, end);
    default: agc_adamw_f32(step, arrays, unscale, begin, end);
  }
}

void agc_adamw_part(const Step<AgcAdamW<true>>& step, const Arrays<AgcAdamW<true>>* arrays, double unscale,
                    int64_t begin, int64_t end) {
  switch (step.grad) {
    case Dtype::f16: return agc_adamw_ema_f16(step, arrays, unscale, begin, end);
    case Dtype::bf16: return agc_adamw_ema_bf16(step, arrays, unscale, begin, end);
    default: agc_adamw_ema_f32(step, arrays, unscale, begin, end);
  }
}

template <bool Ema>
void agc_adamw_cpu(const Step<AgcAdamW<Ema>>& step, const Arrays<AgcAdamW<Ema>>* arrays) {
  in_threads(step, [&](double unscale, int64_t begin, int64_t end) {
    agc_adamw_part(step, arrays, unscale, begin, end);
  });
}

template void agc_adamw_cpu<false>(const Step<AgcAdamW<false>>& step, const Arrays<AgcAdamW<false>>* arrays);
template void agc_adamw_cpu<true>(const Step<AgcAdamW<true>>& step, const Arrays<AgcAdamW<true>>* arrays);

}  // namespace boosterbit
