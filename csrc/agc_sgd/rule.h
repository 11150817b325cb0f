// SGD with momentum, as a rule of csrc/agc/.
#pragma once

#include "../agc/step.h"

namespace boosterbit {

struct AgcSgd {
  static constexpr const char* kName = "agc_sgd_";
  static constexpr int kStates = 1;
  static constexpr const char* kStateNames[kStates] = {"momentum"};
  // Momentum is fetched with parameter and gradient, and waits in registers.
  static constexpr bool kStatesInRegisters = true;
  // Tensors of one launch on a GPU: their addresses are its arguments, of which 32,764 bytes are allowed.
  static constexpr int kMaxTensors = 960;

  // One row of the hyper-parameter table. Layout of a float32 row.
  struct Hyper {
    float momentum;
    float weight_decay;
    float clipping;         // negative: this group is not clipped
    float eps;              // lower bound of a parameter norm in the clipping rule
    float nesterov;         // 0 or 1
    float standardize_eps;  // negative: not standardized; else gradients are of, and copies hold, standardized rows
  };

  // The learning rate.
  using Rate = float;

  // One element: decay, momentum, update. torch.optim.SGD with dampening 0, whose first step (no buffer yet) is this
  // one with a momentum of zeros.
  static BOOSTERBIT_MATH void update(float& param, float (&state)[kStates], float grad, const Hyper& hyper, float lr) {
    float& momentum = state[0];
    const float descent = grad + hyper.weight_decay * param;
    momentum = hyper.momentum * momentum + descent;
    param -= lr * (hyper.nesterov != 0.0f ? descent + hyper.momentum * momentum : momentum);
  }
};

// The launchers. On a GPU one launch on `stream` (a cudaStream_t) of the current device, with units sorted by size class;
// null, or what CUDA says went wrong.
void agc_sgd_cpu(const Step<AgcSgd>& step, const Arrays<AgcSgd>* arrays);
const char* agc_sgd_cuda(const Step<AgcSgd>& step, const Arrays<AgcSgd>* arrays, int tensors,
                         const ClassCounts& classes, void* stream);

}  // namespace boosterbit
