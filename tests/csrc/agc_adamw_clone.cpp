// One clone of the CPU operator, for whatever processor this file is compiled for.
#define BASELINE_ONLY
#include "agc_adamw/cpu.cpp"

using namespace boosterbit;

// `arrays`: 6 addresses for each tensor, as in Arrays. `unscale` 1, one learning rate, with an average.
extern "C" __attribute__((visibility("default"))) void step(const void* units, int64_t count, const float* lr,
                                                            const void* hyper, int grad, int copy,
                                                            const void* arrays) {
  using Rule = AgcAdamW<true>;
  const auto* rows = static_cast<const Rule::Hyper*>(hyper);
  const Rule::Rate rates[2] = {Rule::rate_of(rows[0], *lr, 4.0), Rule::rate_of(rows[1], *lr, 4.0)};
  const Step<Rule> step{static_cast<const Unit*>(units), count,   rates, 1, rows, nullptr, nullptr,
                        static_cast<Dtype>(grad),        static_cast<Dtype>(copy),       nullptr};
  step_part(step, static_cast<const Arrays<Rule>*>(arrays), 1.0, 0, count);
}
