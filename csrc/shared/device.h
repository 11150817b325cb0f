// What the CUDA kernels share above the primitives, which the includer defines before, in namespace boosterbit::device.
#pragma once

#include <cstdint>

#include "types.h"

namespace boosterbit {

// N elements, read and written at once: up to 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T x[N];
};

template <int N, class T>
DEVICE Vector<T, N> read(const T* x, int64_t start) {
  return device::load(reinterpret_cast<const Vector<T, N>*>(x + start));
}

template <class T, int N>
DEVICE void write(T* x, int64_t start, const Vector<T, N>& values) {
  device::store(reinterpret_cast<Vector<T, N>*>(x + start), values);
}

}  // namespace boosterbit
