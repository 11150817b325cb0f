// AGC-SGD on NVIDIA GPUs.
#include "../agc/launch.h"
#include "rule.h"

namespace boosterbit {

const char* agc_sgd_cuda(const Step<AgcSgd>& step, const Arrays<AgcSgd>* arrays, int tensors,
                         const ClassCounts& classes, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  switch (step.grad) {
    case Dtype::none: error = launch<NoGrad>(step, arrays, tensors, classes, on); break;
    case Dtype::f32: error = launch<float>(step, arrays, tensors, classes, on); break;
    case Dtype::f16: error = launch<__half>(step, arrays, tensors, classes, on); break;
    case Dtype::bf16: error = launch<__nv_bfloat16>(step, arrays, tensors, classes, on); break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace boosterbit
