// CUDA's primitives, over which the kernels are written; tests/csrc/emulator.h has the same for a CPU. No torch headers:
// only CUDA files include this, before their kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
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

// Until all lanes of the warp are here, and see what the others wrote.
DEVICE void warp_wait() { __syncwarp(); }

// The sum over all lanes whose numbers differ in the bits from `low` to `high`, powers of 2; over the warp by default.
DEVICE double warp_sum(double value, int high = 16, int low = 1) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    if (mask <= high && mask >= low) value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  return value;
}

// One more; nobody waits for the sum.
DEVICE void count(int32_t* counter) { atomicAdd(reinterpret_cast<int*>(counter), 1); }

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

template <size_t Bytes>
using Word = std::conditional_t<Bytes == 16, int4,
                                std::conditional_t<Bytes == 8, int2, std::conditional_t<Bytes == 4, int, short>>>;

// Two to sixteen bytes in one instruction.
template <class Vector>
DEVICE Vector load(const Vector* from) {
  const auto word = *reinterpret_cast<const Word<sizeof(Vector)>*>(from);
  Vector value;
  memcpy(&value, &word, sizeof(value));
  return value;
}

template <class Vector>
DEVICE void store(Vector* to, const Vector& value) {
  Word<sizeof(Vector)> word;
  memcpy(&word, &value, sizeof(value));
  *reinterpret_cast<Word<sizeof(Vector)>*>(to) = word;
}

// A vector from global to shared memory, past the registers. Both addresses are aligned to their size.
template <class To, class From>
DEVICE void copy_async(To* to, const From* from) {
  const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (sizeof(To) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else if constexpr (sizeof(To) >= 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(sizeof(To)) : "memory");
  } else {
    store(to, load(reinterpret_cast<const To*>(from)));
  }
}

DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Asks the second-level cache for `bytes` from `from` on, both multiples of 16, for all `lanes` threads of a team.
DEVICE void prefetch(const void* from, int64_t bytes, int lane, int lanes) {
#if __CUDA_ARCH__ >= 900
  if (lane == 0 && bytes > 0) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(static_cast<unsigned>(bytes)));
  }
#else
  constexpr int kSector = 32;
  for (int64_t at = lane * kSector; at < bytes; at += lanes * kSector) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + at));
  }
#endif
}

}  // namespace device
}  // namespace boosterbit
