// AGC-SGD on the CPU.
#include "../agc/cpu.h"
#include "rule.h"

namespace boosterbit {

void agc_sgd_cpu(const Step<AgcSgd>& step, const Arrays<AgcSgd>* arrays) { step_cpu(step, arrays); }

}  // namespace boosterbit
