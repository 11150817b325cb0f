// Group norm with ReLU on NVIDIA GPUs, sm_80 and later: the launches. The work is in kernel.h.
#include "../shared/cuda.h"

#include "kernel.h"

namespace boosterbit {
namespace {

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

template <class T, int N, bool Last, class Call>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 1)
    group_norm_relu(const __grid_constant__ Call call, const __grid_constant__ NormPlan plan, int phase,
                    GroupSums* work) {
  extern __shared__ __align__(16) unsigned char memory[];
  run_tiles<T, N, Last>(call, plan, phase, work, *reinterpret_cast<NormShared*>(memory));
}

__global__ void __launch_bounds__(kSumWarps* kLanes)
    group_norm_parameter_gradients(const __grid_constant__ NormBackward call, int64_t rows) {
  __shared__ PartSums shared;
  add_parts(call, rows, shared);
}

template <class T, int N, bool Last, class Call>
cudaError_t launch(const Call& call, NormPlan plan, int phase, GroupSums* work, cudaStream_t stream) {
  const auto kernel = group_norm_relu<T, N, Last, Call>;
  if (phase == kRest) plan.shared -= plan.kept * plan.warps * kLanes * sizeof(Vector<T, N>), plan.kept = 0;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared));
  constexpr auto carveout = cudaFuncAttributePreferredSharedMemoryCarveout;
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, carveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(std::min(plan.blocks(call.shape), kMaxBlocks));
  kernel<<<blocks, plan.warps * kLanes, static_cast<size_t>(plan.shared), stream>>>(call, plan, phase, work);
  return cudaGetLastError();
}

template <class T, int N, bool Last, class Call>
cudaError_t launch_all(const Call& call, const NormPlan& plan, GroupSums* work, cudaStream_t stream) {
  if (plan.parts == 1) return launch<T, N, Last>(call, plan, kAll, work, stream);
  const cudaError_t error = launch<T, N, Last>(call, plan, kSums, work, stream);
  return error == cudaSuccess ? launch<T, N, Last>(call, plan, kRest, work, stream) : error;
}

template <class T, class Call>
cudaError_t launch_as(const Call& call, const NormPlan& plan, GroupSums* work, cudaStream_t stream) {
  constexpr int N = kVectorBytes / sizeof(T);
  if (call.shape.channels_last) {
    return plan.wide ? launch_all<T, N, true>(call, plan, work, stream)
                     : launch_all<T, 1, true>(call, plan, work, stream);
  }
  return plan.wide ? launch_all<T, N, false>(call, plan, work, stream)
                   : launch_all<T, 1, false>(call, plan, work, stream);
}

template <class Call>
cudaError_t launch_for(const Call& call, const NormPlan& plan, double* work, cudaStream_t stream) {
  auto* sums = reinterpret_cast<GroupSums*>(work);
  switch (call.shape.dtype) {
    case Dtype::f16: return launch_as<__half>(call, plan, sums, stream);
    case Dtype::bf16: return launch_as<__nv_bfloat16>(call, plan, sums, stream);
    default: return launch_as<float>(call, plan, sums, stream);
  }
}

const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* norm_device(NormDevice& found) {
  int device = 0, processors = 0, block = 0, processor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  found = NormDevice{processors, block, processor};
  return text(error);
}

const char* group_norm_relu_cuda(const NormForward& call, const NormPlan& plan, double* work, void* stream) {
  return text(launch_for(call, plan, work, static_cast<cudaStream_t>(stream)));
}

const char* group_norm_relu_backward_cuda(const NormBackward& call, const NormPlan& plan, double* work, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = launch_for(call, plan, work, on);
  if (error != cudaSuccess) return text(error);
  const int64_t blocks = std::min(up(call.shape.channels, kLanes), kMaxBlocks);
  group_norm_parameter_gradients<<<static_cast<unsigned>(blocks), kSumWarps * kLanes, 0, on>>>(
      call, call.shape.batch * plan.parts);
  return text(cudaGetLastError());
}

}  // namespace boosterbit
