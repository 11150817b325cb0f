// A GPU for kernels' code on a CPU, with the primitives of csrc/shared/cuda.h: every thread of a block is a fiber, run in
// a random order between barriers. Slow and strict: copies happen as late as they may, shared memory starts as NaN,
// misaligned vectors and mismatched barriers are errors, and so is a prefetch outside of what was told to be there.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define DEVICE inline

namespace boosterbit {
namespace device {

constexpr int kMaxThreads = 512, kBarriers = 16, kStack = 128 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::vector<std::function<void()>> copies;
  const int* waits_for = nullptr;  // a generation that must change
  int seen = 0;
  bool done = false;
};

struct Barrier {
  int arrived = 0, expected = 0, generation = 0;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  Barrier barriers[kBarriers], warp_barriers[kMaxThreads / 32];
  double exchange[kMaxThreads];
  int thread, threads, block, blocks;
  std::vector<std::pair<const char*, const char*>> regions;  // where a prefetch may reach: begin, end
  int64_t prefetched;                                        // bytes
  std::string error;
  std::mt19937 random;
};

static Machine machine;

inline void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
}

inline int thread_index() { return machine.thread; }
inline int block_threads() { return machine.threads; }
inline int block_index() { return machine.block; }
inline int grid_blocks() { return machine.blocks; }

inline void yield() {
  Fiber& self = machine.fibers[machine.thread];
  swapcontext(&self.context, &machine.scheduler);
}

inline void arrive(Barrier& barrier, int threads) {
  Fiber& self = machine.fibers[machine.thread];
  if (barrier.arrived > 0 && barrier.expected != threads) fail("two teams meet at one barrier");
  barrier.expected = threads;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  self.waits_for = &barrier.generation;
  self.seen = barrier.generation;
  yield();
}

inline void barrier(int id, int threads) {
  if (id < 0 || id >= kBarriers) fail("no such barrier");
  arrive(machine.barriers[id], threads);
}

inline void warp_wait() { arrive(machine.warp_barriers[machine.thread / 32], 32); }

// The butterfly of __shfl_xor_sync, in its order of additions.
inline double warp_sum(double value, int high = 16, int low = 1) {
  Barrier& warp = machine.warp_barriers[machine.thread / 32];
  machine.exchange[machine.thread] = value;
  arrive(warp, 32);
  double values[32], next[32];
  std::memcpy(values, machine.exchange + machine.thread / 32 * 32, sizeof(values));
  for (int mask = high; mask >= low && mask > 0; mask >>= 1) {
    for (int lane = 0; lane < 32; ++lane) next[lane] = values[lane] + values[lane ^ mask];
    std::memcpy(values, next, sizeof(values));
  }
  const double sum = values[machine.thread % 32];
  arrive(warp, 32);
  return sum;
}

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

inline void count(int32_t* counter) { ++*counter; }
inline int opaque(int x) { return x; }
template <class T>
float to_float(T x) {
  return static_cast<float>(x);
}
template <class T>
T from_float(float x) {
  return static_cast<T>(x);
}

template <class T>
void check_aligned(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) fail("misaligned vector");
}

template <class Vector>
Vector load(const Vector* from) {
  check_aligned(from);
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <class Vector>
void store(Vector* to, const Vector& value) {
  check_aligned(to);
  std::memcpy(to, &value, sizeof(value));
}

template <class To, class From>
void copy_async(To* to, const From* from) {
  check_aligned(to);
  if (reinterpret_cast<uintptr_t>(from) % sizeof(To)) fail("misaligned copy");
  machine.fibers[machine.thread].copies.push_back([to, from] { std::memcpy(to, from, sizeof(To)); });
}

inline void wait_for_copies() {
  auto& copies = machine.fibers[machine.thread].copies;
  for (const auto& copy : copies) copy();
  copies.clear();
}

inline void prefetch(const void* from, int64_t bytes, int lane, int lanes) {
  const auto* begin = static_cast<const char*>(from);
  if (bytes < 0 || lane < 0 || lane >= lanes) fail("a prefetch of nothing");
  if (reinterpret_cast<uintptr_t>(begin) % 16 || bytes % 16) fail("misaligned prefetch");
  bool inside = bytes == 0;
  for (const auto& region : machine.regions) inside = inside || (begin >= region.first && begin + bytes <= region.second);
  if (!inside) fail("a prefetch outside of the arrays");
  if (lane == 0) machine.prefetched += bytes;
}

inline std::function<void()> body;

inline void enter() {
  body();
  machine.fibers[machine.thread].done = true;
  yield();
}

inline void run_fibers() {
  machine.fibers = std::vector<Fiber>(machine.threads);
  for (auto& barrier : machine.barriers) barrier = {};
  for (auto& barrier : machine.warp_barriers) barrier = {};
  for (auto& fiber : machine.fibers) {
    fiber.stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<int> order(machine.threads);
  for (int i = 0; i < machine.threads; ++i) order[i] = i;
  // Some warps run as far as they get while the others lag; then other ones.
  unsigned awake = 0;
  for (bool runnable = true; runnable && machine.error.empty();) {
    bool moved = false;
    runnable = false;
    std::shuffle(order.begin(), order.end(), machine.random);
    for (const int i : order) {
      auto& fiber = machine.fibers[i];
      if (fiber.done || (fiber.waits_for && *fiber.waits_for == fiber.seen)) continue;
      runnable = true;
      if (!(awake >> (i / 32) & 1)) continue;
      moved = true;
      fiber.waits_for = nullptr;
      machine.thread = i;
      swapcontext(&machine.scheduler, &fiber.context);
    }
    if (!moved) awake = machine.random();
  }
  for (const auto& fiber : machine.fibers) {
    if (!fiber.done) fail("threads wait for each other");
    if (!fiber.copies.empty()) fail("copies that nobody waited for");
  }
}

// All blocks of a launch, one after another, each with its own shared memory.
inline void run_blocks(int blocks, int threads, size_t bytes, const std::function<void(void*)>& block) {
  const auto memory = std::unique_ptr<char, decltype(&std::free)>(
      static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)), &std::free);
  machine.threads = threads;
  machine.blocks = blocks;
  for (machine.block = 0; machine.block < blocks && machine.error.empty(); ++machine.block) {
    std::memset(memory.get(), 0xff, bytes);
    body = [&] { block(memory.get()); };
    run_fibers();
  }
}

// Before a launch.
inline void start(int seed) {
  machine.error.clear();
  machine.random.seed(seed);
  machine.regions.clear();
  machine.prefetched = 0;
}

}  // namespace device
}  // namespace boosterbit
