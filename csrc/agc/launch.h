// A step on NVIDIA GPUs, sm_80 and later, for any rule: the launch. The work is in kernel.h. CUDA files only.
#pragma once

#include "../shared/cuda.h"

#include <algorithm>

#include "kernel.h"

namespace boosterbit {
namespace {

// All arguments by value: nothing to copy to the device before, and a CUDA graph keeps them.
template <class Rule, int Tensors>
struct Arguments {
  Step<Rule> step;
  Schedule schedule;
  Arrays<Rule> arrays[Tensors];
};

template <class Rule, class Grad, int Tensors>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 1)
    agc_step(const __grid_constant__ Arguments<Rule, Tensors> arguments) {
  extern __shared__ __align__(16) unsigned char memory[];
  run_block<Grad>(arguments.step, arguments.schedule, arguments.arrays, *reinterpret_cast<Shared<Rule>*>(memory));
}

template <class Rule, class Grad, int Tensors>
cudaError_t launch_with_room(const Step<Rule>& step, const Arrays<Rule>* arrays, int tensors, const ClassCounts& classes,
                   cudaStream_t stream) {
  static_assert(sizeof(Arguments<Rule, Tensors>) <= 32764, "more than a kernel can be given");
  const auto kernel = agc_step<Rule, Grad, Tensors>;
  int device = 0, processors = 0, available = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  // By the largest gradient type for all: calls that must sum in the same order then have the same teams.
  int most = kMaxWarps;
  while (most > 1 && Shared<Rule>::template bytes<float>(most) > static_cast<size_t>(available)) most /= 2;
  const Schedule schedule = schedule_of(classes, most);
  if (schedule.loads() == 0) return cudaSuccess;
  const int shared = static_cast<int>(Shared<Rule>::template bytes<Grad>(schedule.warps)), threads = schedule.warps * kLanes;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  constexpr auto carveout = cudaFuncAttributePreferredSharedMemoryCarveout;
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, carveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared);
  if (error != cudaSuccess) return error;

  Arguments<Rule, Tensors> arguments{step, schedule, {}};
  std::memcpy(arguments.arrays, arrays, tensors * sizeof(Arrays<Rule>));
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>(schedule.loads(), static_cast<int64_t>(processors) * std::max(resident, 1)));
  kernel<<<blocks, threads, shared, stream>>>(arguments);
  return cudaGetLastError();
}

template <class Grad, class Rule>
cudaError_t launch(const Step<Rule>& step, const Arrays<Rule>* arrays, int tensors, const ClassCounts& classes,
                   cudaStream_t stream) {
  if (tensors == 1) return launch_with_room<Rule, Grad, 1>(step, arrays, tensors, classes, stream);
  return launch_with_room<Rule, Grad, Rule::kMaxTensors>(step, arrays, tensors, classes, stream);
}

}  // namespace
}  // namespace boosterbit
