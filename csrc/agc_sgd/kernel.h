// What a block of the CUDA kernel does. Written against a few primitives (threads, barriers, shuffles, asynchronous
// copies) that the includer defines before, in namespace boosterbit::device: cuda.cu with those of CUDA, and
// tests/csrc/emulated_gpu.cpp with ones that run on a CPU, so that this very code is tested where there is no GPU.
#pragma once

#include "rows.h"

namespace boosterbit {

// Four elements, read and written at once: 16 bytes of float, 8 of half.
template <class T>
struct alignas(kVector * sizeof(T)) Quad {
  T x[kVector];
};

// The gradient type of a call that only writes copies.
struct NoGrad {};

constexpr int kSums = 5;

// Shared memory of a block: two sets of partial sums, used in turn, and each warp's vectors. A thread reads back only
// what it wrote, so vectors need no barrier. Slots are a constant apart, so that one register addresses all.
template <class Grad>
struct WarpVectors {
  Quad<float> param[kSlots][kLanes];
  Quad<Grad> grad[kSlots][kLanes];
};

struct Shared {
  double partial[2][kMaxWarps][kSums];

  template <class Grad>
  DEVICE WarpVectors<Grad>& vectors() {
    return reinterpret_cast<WarpVectors<Grad>*>(this + 1)[device::thread_index() / kLanes];
  }
  template <class Grad>
  static size_t bytes(int warps) {
    return sizeof(Shared) + (std::is_same_v<Grad, NoGrad> ? 0 : warps * sizeof(WarpVectors<Grad>));
  }
};
static_assert(sizeof(Shared) % 16 == 0);

// The warps that work on one unit together.
struct Team {
  int first_warp;
  int warps;
  int lane;    // of this thread, among all of the team's
  int parity;  // which set of partial sums is next

  DEVICE int lanes() const { return warps * kLanes; }
  // Barriers are numbered by the first warp: teams of smaller classes divide larger ones, so no two in use are the same.
  DEVICE void wait() const {
    if (warps > 1) device::barrier(first_warp / 2, lanes());
  }
};

// Sums over the team, the same bits in every thread. The sets alternate: who writes one again has passed the barrier of
// the other, so all have read it.
template <int N>
DEVICE void add_up(double (&sums)[N], Team& team, Shared& shared) {
  for (int k = 0; k < N; ++k) sums[k] = device::warp_sum(sums[k]);
  if (team.warps == 1) return;
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  auto& partial = shared.partial[team.parity];
  team.parity ^= 1;
  if (lane == 0) {
    for (int k = 0; k < N; ++k) partial[warp][k] = sums[k];
  }
  team.wait();
  for (int k = 0; k < N; ++k) sums[k] = device::warp_sum(lane < team.warps ? partial[team.first_warp + lane][k] : 0.0);
}

// A unit and all that belongs to it.
template <class Grad>
struct Row {
  float* p;
  float* m;
  const Grad* g;
  void* copy;
  Dtype copy_dtype;
  Span span;
  Hyper hyper;
  float lr;

  DEVICE bool standardizes() const { return hyper.standardize_eps >= 0.0f; }
};

// Elements from the last multiple of a vector's size to `address`.
DEVICE int phase_of(const void* address, int element_size) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) / element_size % kVector);
}

template <class Grad>
DEVICE Row<Grad> row_of(const Step& step, const Arrays* arrays, const Unit& unit) {
  const Arrays& a = arrays[unit.tensor];
  Row<Grad> row{};
  row.hyper = step.hyper[unit.group];
  row.p = a.param + unit.offset;
  const int phase = phase_of(row.p, sizeof(float));
  bool aligned = true;  // all arrays alike, so that vectors of each lie at the same elements
  if constexpr (!std::is_same_v<Grad, NoGrad>) {
    row.lr = step.lr[unit.group * step.lr_stride];
    row.m = a.momentum + unit.offset;
    row.g = static_cast<const Grad*>(a.grad) + unit.offset;
    aligned = phase_of(row.m, sizeof(float)) == phase && phase_of(row.g, sizeof(Grad)) == phase;
  }
  if (a.copy) {
    const int size = step.copy == Dtype::f32 ? 4 : 2;
    row.copy_dtype = step.copy;
    row.copy = static_cast<char*>(a.copy) + unit.offset * size;
    aligned = aligned && phase_of(row.copy, size) == phase;
  }
  row.span = span_of(unit.length, phase, aligned);
  return row;
}

template <class T>
DEVICE Quad<T> read(const T* x, int64_t start) {
  return device::load(reinterpret_cast<const Quad<T>*>(x + start));
}

template <class T>
DEVICE void write(T* x, int64_t start, const Quad<T>& values) {
  device::store(reinterpret_cast<Quad<T>*>(x + start), values);
}

template <class T>
DEVICE void write_as(void* copy, int64_t start, const Quad<float>& values) {
  Quad<T> cast;
  for (int e = 0; e < kVector; ++e) cast.x[e] = device::from_float<T>(values.x[e]);
  write(static_cast<T*>(copy), start, cast);
}

template <class T>
DEVICE void write_as(void* copy, int64_t start, float value) {
  static_cast<T*>(copy)[start] = device::from_float<T>(value);
}

// Writes a vector, or an element, of the copy.
template <class Grad, class Values>
DEVICE void write_copy(const Row<Grad>& row, int64_t start, const Values& values) {
  if (row.copy_dtype == Dtype::f32) write_as<float>(row.copy, start, values);
  if (row.copy_dtype == Dtype::f16) write_as<device::Half>(row.copy, start, values);
  if (row.copy_dtype == Dtype::bf16) write_as<device::BFloat16>(row.copy, start, values);
}

DEVICE float standardized(float value, const Standardizer& s) { return (value - s.mean) * s.inverse; }

DEVICE Quad<float> standardized(Quad<float> values, const Standardizer& s) {
  for (int e = 0; e < kVector; ++e) values.x[e] = standardized(values.x[e], s);
  return values;
}

// Adds to the sums that the group needs: pp, gg, and with standardization p, g, gp.
DEVICE void accumulate(double (&sums)[kSums], float p, float g, bool standardizes) {
  const double x = p, y = g;
  sums[0] += x * x;
  sums[1] += y * y;
  if (standardizes) {
    sums[2] += x;
    sums[3] += y;
    sums[4] += x * y;
  }
}

template <class Grad>
DEVICE void accumulate(double (&sums)[kSums], const Quad<float>& p, const Quad<Grad>& g, bool standardizes) {
  for (int e = 0; e < kVector; ++e) accumulate(sums, p.x[e], device::to_float(g.x[e]), standardizes);
}

DEVICE void accumulate(double (&moments)[2], float p) {
  const double x = p;
  moments[0] += x;
  moments[1] += x * x;
}

DEVICE void accumulate(double (&moments)[2], const Quad<float>& p) {
  for (int e = 0; e < kVector; ++e) accumulate(moments, p.x[e]);
}

template <class Grad>
DEVICE Transform transform(double (&sums)[kSums], const Row<Grad>& row, double unscale, Team& team, Shared& shared) {
  if (row.standardizes()) {
    add_up(sums, team, shared);
  } else if (needs_sums(row.hyper)) {
    double two[2] = {sums[0], sums[1]};
    add_up(two, team, shared);
    sums[0] = two[0], sums[1] = two[1];
  }
  return transform_of(Sums{sums[2], sums[0], sums[3], sums[1], sums[4]}, row.span.length, unscale, row.hyper);
}

template <class Grad>
DEVICE void update(float& p, float& m, float g, const Transform& t, const Row<Grad>& row) {
  if (row.standardizes()) {
    update(p, m, g, t, row.hyper, row.lr);
  } else {
    update(p, m, g, t.factors, row.hyper, row.lr);
  }
}

// Updates a vector and writes it, with its plain copy.
template <class Grad>
DEVICE void update_vector(Quad<float>& p, Quad<float>& m, const Quad<Grad>& g, const Transform& t, const Row<Grad>& row,
                          int64_t start) {
  for (int e = 0; e < kVector; ++e) update(p.x[e], m.x[e], device::to_float(g.x[e]), t, row);
  write(row.p, start, p);
  write(row.m, start, m);
  if (row.copy && !row.standardizes()) write_copy(row, start, p);
}

template <class Grad>
DEVICE float update_element(float p, float m, float g, const Transform& t, const Row<Grad>& row, int64_t index) {
  update(p, m, g, t, row);
  row.p[index] = p;
  row.m[index] = m;
  if (row.copy && !row.standardizes()) write_copy(row, index, p);
  return p;
}

// A unit that fits on chip: parameters and gradients are fetched to shared memory, momenta to registers, all at once.
// Its edges are fewer than lanes.
template <class Grad>
DEVICE void resident_unit(const Row<Grad>& row, double unscale, Team& team, Shared& shared) {
  const int count = static_cast<int>(row.span.vectors), lanes = team.lanes();
  const int warp_lane = device::thread_index() % kLanes;
  auto& own = shared.vectors<Grad>();
  const bool has_edge = team.lane < edge_count(row.span);
  const int edge = static_cast<int>(edge_index(row.span, team.lane));
  Quad<float> m[kSlots];
  float edge_p = 0.0f, edge_m = 0.0f, edge_g = 0.0f;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int vector = team.lane + slot * lanes;
    if (vector < count) {
      const int64_t start = vector_start(row.span, vector);
      device::copy_async(&own.param[slot][warp_lane], row.p + start);
      device::copy_async(&own.grad[slot][warp_lane], row.g + start);
      m[slot] = read(row.m, start);
    }
  }
  if (has_edge) edge_p = row.p[edge], edge_m = row.m[edge], edge_g = device::to_float(row.g[edge]);
  device::wait_for_copies();

  double sums[kSums] = {};
  if (needs_sums(row.hyper)) {
#pragma unroll 2
    for (int slot = 0; slot < kSlots; ++slot) {
      if (team.lane + slot * lanes < count)
        accumulate(sums, own.param[slot][warp_lane], own.grad[slot][warp_lane], row.standardizes());
    }
    accumulate(sums, edge_p, edge_g, row.standardizes());
  }
  const Transform t = transform(sums, row, unscale, team, shared);

  const int lane = device::opaque(team.lane);  // addresses are computed anew: kept, they would take 80 registers
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int vector = lane + slot * lanes;
    if (vector < count) {
      Quad<float> p = own.param[slot][warp_lane];
      update_vector(p, m[slot], own.grad[slot][warp_lane], t, row, vector_start(row.span, vector));
      if (row.standardizes()) own.param[slot][warp_lane] = p;
    }
  }
  if (has_edge) edge_p = update_element(edge_p, edge_m, edge_g, t, row, edge);

  if (!row.copy || !row.standardizes()) return;
  double moments[2] = {};
#pragma unroll 2
  for (int slot = 0; slot < kSlots; ++slot) {
    if (team.lane + slot * lanes < count) accumulate(moments, own.param[slot][warp_lane]);
  }
  accumulate(moments, edge_p);
  add_up(moments, team, shared);
  const Standardizer s = standardizer(moments[0], moments[1], row.span.length, row.hyper);
#pragma unroll 2
  for (int slot = 0; slot < kSlots; ++slot) {
    const int vector = team.lane + slot * lanes;
    if (vector < count) write_copy(row, vector_start(row.span, vector), standardized(own.param[slot][warp_lane], s));
  }
  if (has_edge) write_copy(row, edge, standardized(edge_p, s));
}

// The copy, from parameters in global memory; with standardization, from their sums and those of the other threads.
template <class Grad>
DEVICE void copy_unit(const Row<Grad>& row, double (&moments)[2], Team& team, Shared& shared) {
  Standardizer s{0.0f, 1.0f};
  if (row.standardizes()) {
    add_up(moments, team, shared);
    s = standardizer(moments[0], moments[1], row.span.length, row.hyper);
  }
  for (int64_t i = team.lane; i < row.span.vectors; i += team.lanes()) {
    const int64_t start = vector_start(row.span, i);
    const Quad<float> p = read(row.p, start);
    write_copy(row, start, row.standardizes() ? standardized(p, s) : p);
  }
  for (int64_t i = team.lane; i < edge_count(row.span); i += team.lanes()) {
    const int64_t index = edge_index(row.span, i);
    write_copy(row, index, row.standardizes() ? standardized(row.p[index], s) : row.p[index]);
  }
}

// A unit that does not fit, or whose arrays lie unevenly: read once for the sums and again for the update.
template <class Grad>
DEVICE void long_unit(const Row<Grad>& row, double unscale, Team& team, Shared& shared) {
  const int64_t vectors = row.span.vectors, edges = edge_count(row.span);
  double sums[kSums] = {};
  if (needs_sums(row.hyper)) {
    for (int64_t i = team.lane; i < vectors; i += team.lanes()) {
      const int64_t start = vector_start(row.span, i);
      accumulate(sums, read(row.p, start), read(row.g, start), row.standardizes());
    }
    for (int64_t i = team.lane; i < edges; i += team.lanes()) {
      const int64_t index = edge_index(row.span, i);
      accumulate(sums, row.p[index], device::to_float(row.g[index]), row.standardizes());
    }
  }
  const Transform t = transform(sums, row, unscale, team, shared);
  double moments[2] = {};
  for (int64_t i = team.lane; i < vectors; i += team.lanes()) {
    const int64_t start = vector_start(row.span, i);
    Quad<float> p = read(row.p, start), m = read(row.m, start);
    update_vector(p, m, read(row.g, start), t, row, start);
    if (row.standardizes()) accumulate(moments, p);
  }
  for (int64_t i = team.lane; i < edges; i += team.lanes()) {
    const int64_t index = edge_index(row.span, i);
    const float p = update_element(row.p[index], row.m[index], device::to_float(row.g[index]), t, row, index);
    if (row.standardizes()) accumulate(moments, p);
  }
  if (row.copy && row.standardizes()) copy_unit(row, moments, team, shared);  // each thread reads what it wrote
}

// Only the copy, by the same sums in the same order as after an update.
DEVICE void write_only(const Row<NoGrad>& row, Team& team, Shared& shared) {
  double moments[2] = {};
  if (row.standardizes()) {
    for (int64_t i = team.lane; i < row.span.vectors; i += team.lanes())
      accumulate(moments, read(row.p, vector_start(row.span, i)));
    for (int64_t i = team.lane; i < edge_count(row.span); i += team.lanes())
      accumulate(moments, row.p[edge_index(row.span, i)]);
  }
  copy_unit(row, moments, team, shared);
}

// One of the persistent blocks: takes its loads from the longest units to the shortest.
template <class Grad>
DEVICE void run_block(const Step& step, const Schedule& schedule, const Arrays* arrays, Shared& shared) {
  if (step.found_inf && *step.found_inf != 0.0f) return;
  const double unscale = step.grad_scale ? 1.0 / static_cast<double>(*step.grad_scale) : 1.0;
  const int warp = device::thread_index() / kLanes;
  Team team{0, schedule.warps, device::thread_index(), 0};
  for (int64_t index = device::block_index(); index < schedule.loads(); index += device::grid_blocks()) {
    const Load load = find_load(schedule, index);
    if (load.team != team.warps) {
      team.wait();  // the smaller teams' partial sums must not meet readers of the larger one's
      team.warps = load.team;
      team.first_warp = warp & ~(load.team - 1);
      team.lane = device::thread_index() - team.first_warp * kLanes;
    }
    const int64_t u = load.first + team.first_warp / load.team;
    if (u >= load.end) continue;
    const Row<Grad> row = row_of<Grad>(step, arrays, step.units[u]);
    if constexpr (std::is_same_v<Grad, NoGrad>) {
      write_only(row, team, shared);
    } else if (load.is_long || edge_count(row.span) > kLanes) {
      long_unit(row, unscale, team, shared);
    } else {
      resident_unit(row, unscale, team, shared);
    }
  }
}

}  // namespace boosterbit
