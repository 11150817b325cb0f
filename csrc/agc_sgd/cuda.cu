// AGC-SGD on NVIDIA GPUs, sm_80 and later: CUDA's primitives, and the launch. The work is in kernel.h.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#define DEVICE __device__ __forceinline__

namespace boosterbit {
namespace device {

using Half = __half;
using BFloat16 = __nv_bfloat16;

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_threads() { return blockDim.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int grid_blocks() { return gridDim.x; }

DEVICE void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

DEVICE double warp_sum(double value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// The same number, without the compiler knowing.
DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(Half x) { return __half2float(x); }
DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }

template <class T>
DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, Half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(x);
}

// Eight or sixteen bytes in one instruction.
template <class Vector>
DEVICE Vector load(const Vector* from) {
  using Word = std::conditional_t<sizeof(Vector) == 16, int4, int2>;
  const Word word = *reinterpret_cast<const Word*>(from);
  Vector value;
  memcpy(&value, &word, sizeof(value));
  return value;
}

template <class Vector>
DEVICE void store(Vector* to, const Vector& value) {
  using Word = std::conditional_t<sizeof(Vector) == 16, int4, int2>;
  Word word;
  memcpy(&word, &value, sizeof(value));
  *reinterpret_cast<Word*>(to) = word;
}

// Four elements from global to shared memory, past the registers. Both addresses are aligned to their size.
template <class To, class From>
DEVICE void copy_async(To* to, const From* from) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (sizeof(To) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(sizeof(To)) : "memory");
  }
}

DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace device
}  // namespace boosterbit

#include "kernel.h"

namespace boosterbit {
namespace {

// All arguments by value: nothing to copy to the device before, and a CUDA graph keeps them.
template <int Tensors>
struct Arguments {
  Step step;
  Schedule schedule;
  Arrays arrays[Tensors];
};

template <class Grad, int Tensors>
__global__ void __launch_bounds__(kMaxWarps* kLanes, 1) agc_sgd(const __grid_constant__ Arguments<Tensors> arguments) {
  extern __shared__ __align__(16) unsigned char memory[];
  run_block<Grad>(arguments.step, arguments.schedule, arguments.arrays, *reinterpret_cast<Shared*>(memory));
}

template <class Grad, int Tensors>
cudaError_t launch(const Step& step, const Arrays* arrays, int tensors, const ClassCounts& classes,
                   cudaStream_t stream) {
  static_assert(sizeof(Arguments<Tensors>) <= 32764, "more than a kernel can be given");
  const auto kernel = agc_sgd<Grad, Tensors>;
  int device = 0, processors = 0, available = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  // By the largest gradient type for all: calls that must sum in the same order then have the same teams.
  int most = kMaxWarps;
  while (most > 1 && Shared::bytes<float>(most) > static_cast<size_t>(available)) most /= 2;
  const Schedule schedule = schedule_of(classes, most);
  if (schedule.loads() == 0) return cudaSuccess;
  const int shared = static_cast<int>(Shared::bytes<Grad>(schedule.warps)), threads = schedule.warps * kLanes;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  constexpr auto carveout = cudaFuncAttributePreferredSharedMemoryCarveout;
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, carveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared);
  if (error != cudaSuccess) return error;

  Arguments<Tensors> arguments{step, schedule, {}};
  std::memcpy(arguments.arrays, arrays, tensors * sizeof(Arrays));
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>(schedule.loads(), static_cast<int64_t>(processors) * std::max(resident, 1)));
  kernel<<<blocks, threads, shared, stream>>>(arguments);
  return cudaGetLastError();
}

template <class Grad>
cudaError_t launch(const Step& step, const Arrays* arrays, int tensors, const ClassCounts& classes,
                   cudaStream_t stream) {
  if (tensors == 1) return launch<Grad, 1>(step, arrays, tensors, classes, stream);
  return launch<Grad, kMaxTensors>(step, arrays, tensors, classes, stream);
}

}  // namespace

const char* agc_sgd_cuda(const Step& step, const Arrays* arrays, int tensors, const ClassCounts& classes,
                         void* stream) {
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
