// The CUDA kernels of group norm with ReLU on a CPU.
#include "emulator.h"

#include "group_norm/kernel.h"

namespace {

using namespace boosterbit;
using device::machine;

template <class T, int N, bool Last, class Call>
void run(const Call& call, NormPlan plan, GroupSums* work, int blocks) {
  for (const int phase : plan.parts == 1 ? std::vector<int>{kAll} : std::vector<int>{kSums, kRest}) {
    if (phase == kRest) plan.shared -= plan.kept * plan.warps * kLanes * sizeof(Vector<T, N>), plan.kept = 0;
    device::run_blocks(blocks, plan.warps * kLanes, plan.shared, [&](void* memory) {
      run_tiles<T, N, Last>(call, plan, phase, work, *static_cast<NormShared*>(memory));
    });
  }
}

template <class T, class Call>
void run_as(const Call& call, const NormPlan& plan, GroupSums* work, int blocks) {
  constexpr int N = kVectorBytes / sizeof(T);
  if (call.shape.channels_last) {
    plan.wide ? run<T, N, true>(call, plan, work, blocks) : run<T, 1, true>(call, plan, work, blocks);
  } else {
    plan.wide ? run<T, N, false>(call, plan, work, blocks) : run<T, 1, false>(call, plan, work, blocks);
  }
}

template <class Call>
void run_for(const Call& call, const NormPlan& plan, int blocks) {
  const double unwritten = std::numeric_limits<double>::quiet_NaN();
  std::vector<GroupSums> work(call.shape.batch * call.shape.groups * plan.parts, GroupSums{unwritten, unwritten});
  switch (call.shape.dtype) {
    case Dtype::f16: return run_as<c10::Half>(call, plan, work.data(), blocks);
    case Dtype::bf16: return run_as<c10::BFloat16>(call, plan, work.data(), blocks);
    default: return run_as<float>(call, plan, work.data(), blocks);
  }
}

bool aligned(std::initializer_list<const void*> activations) {
  bool all = true;
  for (const void* x : activations) all = all && reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0;
  return all;
}

NormShape shape_of(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4] != 0, static_cast<Dtype>(s[5])}; }
NormDevice device_of(const int64_t* d) { return {d[0], d[1], d[2]}; }
const char* error() { return machine.error.empty() ? nullptr : machine.error.c_str(); }

}  // namespace

// `shape`: batch, channels, pixels, groups, channels-last, dtype. `gpu`: processors, shared memory of a block, of a
// processor. They return null, or what went wrong.
extern "C" const char* forward(const int64_t* shape, const int64_t* gpu, const void* x, const float* gamma,
                               const float* beta, double eps, void* y, float* mean, float* inverse, int blocks,
                               int seed) {
  device::start(seed);
  const NormForward call{shape_of(shape), x, gamma, beta, eps, y, mean, inverse};
  run_for(call, norm_plan(call.shape, aligned({x, y}), 1, device_of(gpu)), blocks);
  return error();
}

extern "C" const char* backward(const int64_t* shape, const int64_t* gpu, const void* grad, const void* x,
                                const float* gamma, const float* beta, const float* mean, const float* inverse,
                                const void* shortcut, void* grad_x, float* grad_gamma, float* grad_beta, int blocks, int seed) {
  device::start(seed);
  NormBackward call{shape_of(shape), grad, x,       gamma,   beta,       mean,     inverse,
                    shortcut,        grad_x, nullptr, nullptr, grad_gamma, grad_beta};
  const NormPlan plan = norm_plan(call.shape, aligned({grad, x, shortcut, grad_x}), 2, device_of(gpu));
  const int64_t rows = call.shape.batch * plan.parts;
  std::vector<float> parts(2 * rows * call.shape.channels, std::numeric_limits<float>::quiet_NaN());
  call.gamma_parts = parts.data();
  call.beta_parts = parts.data() + rows * call.shape.channels;
  run_for(call, plan, blocks);
  if (machine.error.empty()) {
    device::run_blocks(blocks, kSumWarps * kLanes, sizeof(PartSums),
                       [&](void* memory) { add_parts(call, rows, *static_cast<PartSums*>(memory)); });
  }
  return error();
}

// The plan for activations that are aligned, or not: wide, groups, lanes, side, warps, kept, parts, rows, shared, tiles,
// and whether a thread keeps all that it reads.
extern "C" void plan(const int64_t* shape, const int64_t* gpu, int is_aligned, int arrays, int64_t* found) {
  const NormShape s = shape_of(shape);
  const NormPlan p = norm_plan(s, is_aligned != 0, arrays, device_of(gpu));
  const int64_t strips = s.channels_last ? up(p.groups * (s.channels / s.groups), strip_channels(s, p))
                                         : p.groups * (s.channels / s.groups);
  const int64_t slots = up(strips, p.side) * up(p.rows, p.warps / p.side * (kLanes / p.lanes));
  const int64_t values[] = {p.wide, p.groups, p.lanes, p.side, p.warps, p.kept, p.parts, p.rows, p.shared, p.tiles,
                            slots <= p.kept};
  std::copy(std::begin(values), std::end(values), found);
}
