// AdamW, with a moving average of the parameters (EMA) or without, as a rule of csrc/agc/.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../agc/step.h"

namespace boosterbit {

template <bool Ema>
struct AgcAdamW {
  static constexpr const char* kName = "agc_adamw_";
  static constexpr int kStates = Ema ? 3 : 2;
  static constexpr const char* kStateNames[3] = {"exp_avg", "exp_avg_sq", "ema"};
  // So many would take more registers than there are: they are read when their turn comes, from the second-level cache.
  static constexpr bool kStatesInRegisters = false;
  static constexpr int kMaxTensors = 640;

  // One row of the hyper-parameter table. Layout of a float32 row. Of what is near 1 the distance to 1 is told: float32
  // holds 1 - 0.999 to 8 digits, but 0.999 only so that 5 of these are left.
  struct Hyper {
    float one_minus_beta1;
    float one_minus_beta2;
    float weight_decay;
    float clipping;  // negative: this group is not clipped
    float eps;       // lower bound of a parameter norm in the clipping rule
    float adam_eps;
    float one_minus_decay;  // of the moving average
    float standardize_eps;  // negative: not standardized; else gradients are of, and copies hold, standardized rows
  };

  // What the number of steps and the learning rate come to, for a group.
  struct Rate {
    float decay;  // lr * weight_decay
    float step;   // lr / (1 - beta1^t)
    float root;   // 1 / sqrt(1 - beta2^t)
  };

  static BOOSTERBIT_MATH Rate rate_of(const Hyper& hyper, double lr, double steps) {
    const double bias1 = -expm1(steps * log1p(-static_cast<double>(hyper.one_minus_beta1)));
    const double bias2 = -expm1(steps * log1p(-static_cast<double>(hyper.one_minus_beta2)));
    return Rate{static_cast<float>(lr * hyper.weight_decay), static_cast<float>(lr / bias1),
                static_cast<float>(1.0 / sqrt(bias2))};
  }

  // average + weight * (value - average), for a weight over 1/2 from the other end, where nothing cancels. The end is
  // chosen by its bits: of a condition, the same for all elements, compilers make loops for each case, of which AVX2's
  // were of single elements.
  static BOOSTERBIT_MATH float towards(float average, float value, float weight) {
    const bool far = weight >= 0.5f;
    const uint32_t mask = 0u - static_cast<uint32_t>(far);
    uint32_t bits, other;
    std::memcpy(&bits, &average, sizeof(bits));
    std::memcpy(&other, &value, sizeof(other));
    bits = (bits & ~mask) | (other & mask);
    float end;
    std::memcpy(&end, &bits, sizeof(end));
    return end + (weight - static_cast<float>(far)) * (value - average);
  }

  // One element: torch.optim.AdamW without amsgrad; then the average of the new parameter.
  static BOOSTERBIT_MATH void update(float& param, float (&state)[kStates], float grad, const Hyper& hyper,
                                     const Rate& rate) {
    const float mean = state[0] = towards(state[0], grad, hyper.one_minus_beta1);
    const float squared = grad * grad < FLT_MAX ? grad * grad : FLT_MAX;  // infinity could never be left again
    const float square = state[1] = towards(state[1], squared, hyper.one_minus_beta2);
    // Both at once, so that a small step and a small decay are not each rounded away beside the parameter.
    param -= rate.decay * param + rate.step * mean / (sqrtf(square) * rate.root + hyper.adam_eps);
    if constexpr (Ema) state[2] = towards(state[2], param, hyper.one_minus_decay);
  }
};

// Makes of the steps before, and each group's learning rate, the rates of the step after them. The count is one more then.
// Where `found_inf` is not 0 nothing is written.
template <class Rule>
struct Count {
  float* steps;
  const float* lr;  // one value, or one per group
  int64_t lr_stride;
  const typename Rule::Hyper* hyper;
  int64_t groups;
  const float* found_inf;  // or null
  typename Rule::Rate* rates;
};

// The launchers, as in agc_sgd/rule.h; on a GPU two launches, the first of which counts.
template <bool Ema>
void agc_adamw_cpu(const Step<AgcAdamW<Ema>>& step, const Arrays<AgcAdamW<Ema>>* arrays);
template <bool Ema>
const char* agc_adamw_cuda(const Step<AgcAdamW<Ema>>& step, const Arrays<AgcAdamW<Ema>>* arrays, int tensors,
                           const ClassCounts& classes, const Count<AgcAdamW<Ema>>& count, void* stream);

}  // namespace boosterbit
