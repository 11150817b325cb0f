// The CUDA kernel of AGC-SGD on a CPU.
#include "emulated_agc.h"

#include "agc_sgd/rule.h"

extern "C" const char* emulate(const boosterbit::Launch* launch, const float* lr) {
  return boosterbit::emulate<boosterbit::AgcSgd>(*launch, lr, 0);
}
