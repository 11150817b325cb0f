// AGC-SGD on the CPU.
#include "../agc/cpu.h"
#include "rule.h"

namespace boosterbit {

FOR_EACH_CPU void agc_sgd_f32(const Step<AgcSgd>& step, const Arrays<AgcSgd>* arrays, double unscale, int64_t begin,
                              int64_t end) {
  run<AgcSgd, float>(step, arrays, unscale, begin, end);
}
FOR_EACH_CPU void agc_sgd_f16(const Step<AgcSgd>& step, const Arrays<AgcSgd>* arrays, double unscale, int64_t begin,
                              int64_t end) {
  run<AgcSgd, c10::Half>(step, arrays, unscale, begin, end);
}
FOR_EACH_CPU void agc_sgd_bf16(const Step<AgcSgd>& step, const Arrays<AgcSgd>* arrays, double unscale, int64_t begin,
                               int64_t end) {
  run<AgcSgd, c10::BFloat16>(step, arrays, unscale, begin, end);
}
FOR_EACH_CPU void agc_sgd_none(const Step<AgcSgd>& step, const Arrays<AgcSgd>* arrays, int64_t begin, int64_t end) {
  copy_only(step, arrays, begin, end);
}

// The units from `begin` to `end`.
void agc_sgd_part(const Step<AgcSgd>& step, const Arrays<AgcSgd>* arrays, double unscale, int64_t begin, int64_t end) {
  switch (step.grad) {
    case Dtype::f16: return agc_sgd_f16(step, arrays, unscale, begin, end);
    case Dtype::none: return agc_sgd_none(step, arrays, begin, end);
    case Dtype::bf16: return agc_sgd_bf16(step, arrays, unscale, begin, end);
    default: agc_sgd_f32(step, arrays, unscale, begin, end);
  }
}

void agc_sgd_cpu(const Step<AgcSgd>& step, const Arrays<AgcSgd>* arrays) {
  in_threads(step, [&](double unscale, int64_t begin, int64_t end) {
    agc_sgd_part(step, arrays, unscale, begin, end);
  });
}

}  // namespace boosterbit
