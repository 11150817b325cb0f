// One clone of the CPU operator, for whatever processor this file is compiled for.
#define BASELINE_ONLY
#include "agc_sgd/cpu.cpp"

using namespace boosterbit;

// `arrays`: 4 addresses for each tensor, as in Arrays. `unscale` 1, one learning rate.
extern "C" __attribute__((visibility("default"))) void step(const void* units, int64_t count, const float* lr,
                                                            const void* hyper, int grad, int copy,
                                                            const void* arrays) {
  const Step<AgcSgd> step{static_cast<const Unit*>(units),
                          count,
                          lr,
                          0,
                          static_cast<const AgcSgd::Hyper*>(hyper),
                          nullptr,
                          nullptr,
                          static_cast<Dtype>(grad),
                          static_cast<Dtype>(copy),
                          nullptr};
  step_part(step, static_cast<const Arrays<AgcSgd>*>(arrays), 1.0, 0, count);
}
