// AdamW behind AGC on NVIDIA GPUs: two launches, the first of which is small.
#include "../agc/launch.h"
#include "count.h"

namespace boosterbit {
namespace {

template <class Rule>
__global__ void __launch_bounds__(kCountThreads) agc_count(const Count<Rule> count) {
  count_step(count);
}

}  // namespace

template <bool Ema>
const char* agc_adamw_cuda(const Step<AgcAdamW<Ema>>& step, const Arrays<AgcAdamW<Ema>>* arrays, int tensors,
                           const ClassCounts& classes, const Count<AgcAdamW<Ema>>& count, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  agc_count<<<1, kCountThreads, 0, on>>>(count);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return cudaGetErrorString(error);
  switch (step.grad) {
    case Dtype::f16: error = launch<__half>(step, arrays, tensors, classes, on); break;
    case Dtype::bf16: error = launch<__nv_bfloat16>(step, arrays, tensors, classes, on); break;
    default: error = launch<float>(step, arrays, tensors, classes, on); break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template const char* agc_adamw_cuda<false>(const Step<AgcAdamW<false>>&, const Arrays<AgcAdamW<false>>*, int,
                                           const ClassCounts&, const Count<AgcAdamW<false>>&, void*);
template const char* agc_adamw_cuda<true>(const Step<AgcAdamW<true>>&, const Arrays<AgcAdamW<true>>*, int,
                                          const ClassCounts&, const Count<AgcAdamW<true>>&, void*);

}  // namespace boosterbit
