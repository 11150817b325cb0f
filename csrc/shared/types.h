// What all families of kernels share, on the host and on the device. Plain types only.
#pragma once

#include <cstdint>

// Scalar arithmetic that CPU and GPU have in common.
#if defined(__CUDACC__)
#define BOOSTERBIT_MATH __host__ __device__ __forceinline__
#else
#define BOOSTERBIT_MATH inline __attribute__((always_inline))
#endif

namespace boosterbit {

enum class Dtype : int32_t { none, f32, f16, bf16 };

}  // namespace boosterbit
