// What a block of the CUDA kernel does, for any rule. Written against a few primitives (threads, barriers, shuffles,
// asynchronous copies) that the includer includes before: launch.h those of CUDA (../shared/cuda.h), and the files
// tests/csrc/emulated_*.cpp ones that run on a CPU, so that this very code is tested where there is no GPU.
#pragma once

#include "../shared/device.h"
#include "rows.h"

namespace boosterbit {

// Four elements: 16 bytes of float, 8 of half.
template <class T>
using Quad = Vector<T, kVector>;

// The gradient type of a call that only writes copies.
struct NoGrad {};

constexpr int kSums = 5;

// What is read of a unit before its turn.
template <class Rule>
struct Ahead {
  Unit unit;
  typename Rule::Hyper hyper;
  typename Rule::Rate rate;
  double per;  // 1 / its length
};

// Shared memory of a block: what each warp's next unit is, two sets of partial sums, used in turn, and each warp's
// vectors. A thread reads back only what it wrote, so vectors need no barrier. Slots are a constant apart, so that one
// register addresses all.
template <class Grad>
struct WarpVectors {
  Quad<float> param[kSlots][kLanes];
  Quad<Grad> grad[kSlots][kLanes];
};

using Partial = double[kMaxWarps][kSums];

template <class Rule>
struct Shared {
  Partial partial[2];
  Ahead<Rule> ahead[kMaxWarps];

  template <class Grad>
  DEVICE WarpVectors<Grad>& vectors() {
    return reinterpret_cast<WarpVectors<Grad>*>(this + 1)[device::thread_index() / kLanes];
  }
  template <class Grad>
  static size_t bytes(int warps) {
    static_assert(sizeof(Shared) % 16 == 0);
    return sizeof(Shared) + (std::is_same_v<Grad, NoGrad> ? 0 : warps * sizeof(WarpVectors<Grad>));
  }
};

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
DEVICE void add_up(double (&sums)[N], Team& team, Partial (&sets)[2]) {
  for (int k = 0; k < N; ++k) sums[k] = device::warp_sum(sums[k]);
  if (team.warps == 1) return;
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  auto& partial = sets[team.parity];
  team.parity ^= 1;
  if (lane == 0) {
    for (int k = 0; k < N; ++k) partial[warp][k] = sums[k];
  }
  team.wait();
  for (int k = 0; k < N; ++k) sums[k] = device::warp_sum(lane < team.warps ? partial[team.first_warp + lane][k] : 0.0);
}

// A unit and all that belongs to it.
template <class Rule, class Grad>
struct Row {
  float* p;
  float* state[Rule::kStates];
  const Grad* g;
  void* copy;
  Dtype copy_dtype;
  Span span;
  double per;  // 1 / its length
  typename Rule::Hyper hyper;
  typename Rule::Rate rate;
  int32_t* clipped;  // its counter

  DEVICE bool standardizes() const { return hyper.standardize_eps >= 0.0f; }
};

// Elements from the last multiple of a vector's size to `address`.
DEVICE int phase_of(const void* address, int element_size) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(address) / element_size % kVector);
}

template <class Grad, class Rule>
DEVICE Row<Rule, Grad> row_of(const Step<Rule>& step, const Arrays<Rule>* arrays, const Ahead<Rule>& ahead) {
  const Unit& unit = ahead.unit;
  const Arrays<Rule>& a = arrays[unit.tensor];
  Row<Rule, Grad> row{};
  row.per = ahead.per;
  row.hyper = ahead.hyper;
  row.p = a.param + unit.offset;
  const int phase = phase_of(row.p, sizeof(float));
  bool aligned = true;  // all arrays alike, so that vectors of each lie at the same elements
  if constexpr (!std::is_same_v<Grad, NoGrad>) {
    row.rate = ahead.rate;
    row.g = static_cast<const Grad*>(a.grad) + unit.offset;
    aligned = phase_of(row.g, sizeof(Grad)) == phase;
    for (int k = 0; k < Rule::kStates; ++k) {
      row.state[k] = a.state[k] + unit.offset;
      aligned = aligned && phase_of(row.state[k], sizeof(float)) == phase;
    }
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
template <class Rule, class Grad, class Values>
DEVICE void write_copy(const Row<Rule, Grad>& row, int64_t start, const Values& values) {
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
template <bool Standardizes>
DEVICE void accumulate(double (&sums)[kSums], float p, float g) {
  const double x = p, y = g;
  sums[0] += x * x;
  sums[1] += y * y;
  if constexpr (Standardizes) {
    sums[2] += x;
    sums[3] += y;
    sums[4] += x * y;
  }
}

template <bool Standardizes, class Grad>
DEVICE void accumulate(double (&sums)[kSums], const Quad<float>& p, const Quad<Grad>& g) {
  for (int e = 0; e < kVector; ++e) accumulate<Standardizes>(sums, p.x[e], device::to_float(g.x[e]));
}

DEVICE void accumulate(double (&moments)[2], float p) {
  const double x = p;
  moments[0] += x;
  moments[1] += x * x;
}

DEVICE void accumulate(double (&moments)[2], const Quad<float>& p) {
  for (int e = 0; e < kVector; ++e) accumulate(moments, p.x[e]);
}

// What becomes of the unit's gradient, from the sums of all threads; counts the unit where it is clipped.
template <class Rule, class Grad>
DEVICE Transform transform(double (&sums)[kSums], const Row<Rule, Grad>& row, double unscale, Team& team,
                           Shared<Rule>& shared) {
  if (row.standardizes()) {
    add_up(sums, team, shared.partial);
  } else if (needs_sums(row.hyper)) {
    double two[2] = {sums[0], sums[1]};
    add_up(two, team, shared.partial);
    sums[0] = two[0], sums[1] = two[1];
  }
  const Transform t = transform_of(Sums{sums[2], sums[0], sums[3], sums[1], sums[4]}, row.per, unscale, row.hyper);
  if (t.factors.clipped && row.clipped && team.lane == 0) device::count(row.clipped);
  return t;
}

template <class Rule, class Grad>
DEVICE void update(float& p, float (&state)[Rule::kStates], float g, const Transform& t, const Row<Rule, Grad>& row) {
  if (row.standardizes()) {
    update<Rule>(p, state, g, t, row.hyper, row.rate);
  } else {
    update<Rule>(p, state, g, t.factors, row.hyper, row.rate);
  }
}

// Vectors of a rule's states that belong to one vector of parameters.
template <class Rule>
struct StateQuads {
  Quad<float> of[Rule::kStates];
};

template <class Rule, class Grad>
DEVICE StateQuads<Rule> read_states(const Row<Rule, Grad>& row, int64_t start) {
  StateQuads<Rule> states;
  for (int k = 0; k < Rule::kStates; ++k) states.of[k] = read<kVector>(row.state[k], start);
  return states;
}

// Updates a vector and writes it, with its plain copy.
template <class Rule, class Grad>
DEVICE void update_vector(Quad<float>& p, StateQuads<Rule>& states, const Quad<Grad>& g, const Transform& t,
                          const Row<Rule, Grad>& row, int64_t start) {
  for (int e = 0; e < kVector; ++e) {
    float values[Rule::kStates];
    for (int k = 0; k < Rule::kStates; ++k) values[k] = states.of[k].x[e];
    update(p.x[e], values, device::to_float(g.x[e]), t, row);
    for (int k = 0; k < Rule::kStates; ++k) states.of[k].x[e] = values[k];
  }
  write(row.p, start, p);
  for (int k = 0; k < Rule::kStates; ++k) write(row.state[k], start, states.of[k]);
  if (row.copy && !row.standardizes()) write_copy(row, start, p);
}

template <class Rule, class Grad>
DEVICE float update_element(float p, float (&state)[Rule::kStates], float g, const Transform& t,
                            const Row<Rule, Grad>& row, int64_t index) {
  update(p, state, g, t, row);
  row.p[index] = p;
  for (int k = 0; k < Rule::kStates; ++k) row.state[k][index] = state[k];
  if (row.copy && !row.standardizes()) write_copy(row, index, p);
  return p;
}

// The sums over a thread's vectors on chip.
template <bool Standardizes, class Grad>
DEVICE void accumulate(double (&sums)[kSums], const WarpVectors<Grad>& own, int count, const Team& team) {
  const int warp_lane = device::thread_index() % kLanes;
#pragma unroll 2
  for (int slot = 0; slot < kSlots; ++slot) {
    if (team.lane + slot * team.lanes() < count)
      accumulate<Standardizes>(sums, own.param[slot][warp_lane], own.grad[slot][warp_lane]);
  }
}

// Asks the second-level cache for a row's vectors, as many as fit on chip: all threads of a team of `lanes` together.
template <class Rule, class Grad>
DEVICE void prefetch(const Row<Rule, Grad>& row, int lane, int lanes) {
  const int64_t most = static_cast<int64_t>(kSlots) * lanes, vectors = row.span.vectors < most ? row.span.vectors : most;
  const auto ask = [&](const void* array, int element) {
    const auto begin = reinterpret_cast<uintptr_t>(array) + vector_start(row.span, 0) * element;
    const uintptr_t first = (begin + 15) / 16 * 16, end = (begin + vectors * kVector * element) / 16 * 16;
    if (end > first) device::prefetch(reinterpret_cast<const void*>(first), static_cast<int64_t>(end - first), lane, lanes);
  };
  ask(row.p, sizeof(float));
  for (int k = 0; k < Rule::kStates; ++k) ask(row.state[k], sizeof(float));
  ask(row.g, sizeof(Grad));
}

// What a warp does next: its team's unit of a load, none where `some` is false.
struct Next {
  Load load;
  int64_t unit;
  bool some;

  DEVICE Next(const Schedule& schedule, int64_t index, int warp) : load{}, unit(0), some(index < schedule.loads()) {
    if (!some) return;
    load = find_load(schedule, index);
    unit = load.first + warp / load.team;
    some = unit < load.end;
  }
};

// A unit that fits on chip: parameters and gradients are fetched to shared memory, states to registers where the rule
// says so, all at once. Its edges are fewer than lanes. `asked` is called while all this is on its way, `arrived` as soon
// as it is there.
template <class Rule, class Grad, class Asked, class Arrived>
DEVICE void resident_unit(const Row<Rule, Grad>& row, double unscale, Team& team, Shared<Rule>& shared,
                          const Asked& asked, const Arrived& arrived) {
  // Fully unrolled where states are in registers, which have no index; else as many slots at once as these hold.
  constexpr int kAtOnce = Rule::kStatesInRegisters ? kSlots : 2;
  const int count = static_cast<int>(row.span.vectors), lanes = team.lanes();
  const int warp_lane = device::thread_index() % kLanes;
  auto& own = shared.template vectors<Grad>();
  const bool has_edge = team.lane < edge_count(row.span);
  const int edge = static_cast<int>(edge_index(row.span, team.lane));
  StateQuads<Rule> fetched[Rule::kStatesInRegisters ? kSlots : 1];
  float edge_p = 0.0f, edge_states[Rule::kStates] = {}, edge_g = 0.0f;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int vector = team.lane + slot * lanes;
    if (vector < count) {
      const int64_t start = vector_start(row.span, vector);
      device::copy_async(&own.param[slot][warp_lane], row.p + start);
      device::copy_async(&own.grad[slot][warp_lane], row.g + start);
      if constexpr (Rule::kStatesInRegisters) fetched[slot] = read_states(row, start);
    }
  }
  if (has_edge) {
    edge_p = row.p[edge], edge_g = device::to_float(row.g[edge]);
    for (int k = 0; k < Rule::kStates; ++k) edge_states[k] = row.state[k][edge];
  }
  asked();
  device::wait_for_copies();
  arrived();

  double sums[kSums] = {};
  if (row.standardizes()) {
    accumulate<true>(sums, own, count, team);
    accumulate<true>(sums, edge_p, edge_g);
  } else if (needs_sums(row.hyper)) {
    accumulate<false>(sums, own, count, team);
    accumulate<false>(sums, edge_p, edge_g);
  }
  const Transform t = transform(sums, row, unscale, team, shared);

  const int lane = device::opaque(team.lane);  // addresses are computed anew: kept, they would take 80 registers
#pragma unroll kAtOnce
  for (int slot = 0; slot < kSlots; ++slot) {
    const int vector = lane + slot * lanes;
    if (vector < count) {
      const int64_t start = vector_start(row.span, vector);
      if constexpr (!Rule::kStatesInRegisters) fetched[0] = read_states(row, start);
      Quad<float> p = own.param[slot][warp_lane];
      update_vector(p, fetched[Rule::kStatesInRegisters ? slot : 0], own.grad[slot][warp_lane], t, row, start);
      if (row.standardizes()) own.param[slot][warp_lane] = p;
    }
  }
  if (has_edge) edge_p = update_element(edge_p, edge_states, edge_g, t, row, edge);

  if (!row.copy || !row.standardizes()) return;
  double moments[2] = {};
#pragma unroll 2
  for (int slot = 0; slot < kSlots; ++slot) {
    if (team.lane + slot * lanes < count) accumulate(moments, own.param[slot][warp_lane]);
  }
  accumulate(moments, edge_p);
  add_up(moments, team, shared.partial);
  const Standardizer s = standardizer(moments[0], moments[1], row.per, row.hyper);
#pragma unroll 2
  for (int slot = 0; slot < kSlots; ++slot) {
    const int vector = team.lane + slot * lanes;
    if (vector < count) write_copy(row, vector_start(row.span, vector), standardized(own.param[slot][warp_lane], s));
  }
  if (has_edge) write_copy(row, edge, standardized(edge_p, s));
}

// The copy, from parameters in global memory; with standardization, from their sums and those of the other threads.
template <class Rule, class Grad>
DEVICE void copy_unit(const Row<Rule, Grad>& row, double (&moments)[2], Team& team, Shared<Rule>& shared) {
  Standardizer s{0.0f, 1.0f};
  if (row.standardizes()) {
    add_up(moments, team, shared.partial);
    s = standardizer(moments[0], moments[1], row.per, row.hyper);
  }
  for (int64_t i = team.lane; i < row.span.vectors; i += team.lanes()) {
    const int64_t start = vector_start(row.span, i);
    const Quad<float> p = read<kVector>(row.p, start);
    write_copy(row, start, row.standardizes() ? standardized(p, s) : p);
  }
  for (int64_t i = team.lane; i < edge_count(row.span); i += team.lanes()) {
    const int64_t index = edge_index(row.span, i);
    write_copy(row, index, row.standardizes() ? standardized(row.p[index], s) : row.p[index]);
  }
}

// The sums over a thread's part of a unit in global memory.
template <bool Standardizes, class Rule, class Grad>
DEVICE void accumulate(double (&sums)[kSums], const Row<Rule, Grad>& row, const Team& team) {
  for (int64_t i = team.lane; i < row.span.vectors; i += team.lanes()) {
    const int64_t start = vector_start(row.span, i);
    accumulate<Standardizes>(sums, read<kVector>(row.p, start), read<kVector>(row.g, start));
  }
  for (int64_t i = team.lane; i < edge_count(row.span); i += team.lanes()) {
    const int64_t index = edge_index(row.span, i);
    accumulate<Standardizes>(sums, row.p[index], device::to_float(row.g[index]));
  }
}

// A unit that does not fit, or whose arrays lie unevenly: read once for the sums and again for the update.
template <class Rule, class Grad>
DEVICE void long_unit(const Row<Rule, Grad>& row, double unscale, Team& team, Shared<Rule>& shared) {
  const int64_t vectors = row.span.vectors, edges = edge_count(row.span);
  double sums[kSums] = {};
  if (row.standardizes()) {
    accumulate<true>(sums, row, team);
  } else if (needs_sums(row.hyper)) {
    accumulate<false>(sums, row, team);
  }
  const Transform t = transform(sums, row, unscale, team, shared);
  double moments[2] = {};
  for (int64_t i = team.lane; i < vectors; i += team.lanes()) {
    const int64_t start = vector_start(row.span, i);
    Quad<float> p = read<kVector>(row.p, start);
    StateQuads<Rule> states = read_states(row, start);
    update_vector(p, states, read<kVector>(row.g, start), t, row, start);
    if (row.standardizes()) accumulate(moments, p);
  }
  for (int64_t i = team.lane; i < edges; i += team.lanes()) {
    const int64_t index = edge_index(row.span, i);
    float states[Rule::kStates];
    for (int k = 0; k < Rule::kStates; ++k) states[k] = row.state[k][index];
    const float p = update_element(row.p[index], states, device::to_float(row.g[index]), t, row, index);
    if (row.standardizes()) accumulate(moments, p);
  }
  if (row.copy && row.standardizes()) copy_unit(row, moments, team, shared);  // each thread reads what it wrote
}

// Only the copy, by the same sums in the same order as after an update.
template <class Rule>
DEVICE void write_only(const Row<Rule, NoGrad>& row, Team& team, Shared<Rule>& shared) {
  double moments[2] = {};
  if (row.standardizes()) {
    for (int64_t i = team.lane; i < row.span.vectors; i += team.lanes())
      accumulate(moments, read<kVector>(row.p, vector_start(row.span, i)));
    for (int64_t i = team.lane; i < edge_count(row.span); i += team.lanes())
      accumulate(moments, row.p[edge_index(row.span, i)]);
  }
  copy_unit(row, moments, team, shared);
}

// One of the persistent blocks: takes its loads from the longest units to the shortest. While a row is summed, the next
// one comes to the second-level cache, and what belongs to it is read before this one is written.
template <class Grad, class Rule>
DEVICE void run_block(const Step<Rule>& step, const Schedule& schedule, const Arrays<Rule>* arrays,
                      Shared<Rule>& shared) {
  if (step.found_inf && *step.found_inf != 0.0f) return;
  const double unscale = step.grad_scale ? 1.0 / static_cast<double>(*step.grad_scale) : 1.0;
  const int warp = device::thread_index() / kLanes;
  Ahead<Rule>& ahead = shared.ahead[warp];
  int64_t index = device::block_index();
  if (step.clipped && index == 0 && device::thread_index() == 0) device::count(step.clipped + step.count);
  const auto look_ahead = [&] {
    const Next next(schedule, index, warp);
    if (!next.some || device::thread_index() % kLanes != 0) return;
    const Unit unit = step.units[next.unit];
    ahead.unit = unit;
    ahead.hyper = step.hyper[unit.group];
    if constexpr (!std::is_same_v<Grad, NoGrad>) ahead.rate = step.rate[unit.group * step.rate_stride];
    ahead.per = 1.0 / static_cast<double>(unit.length);
  };
  look_ahead();
  device::warp_wait();
  Team team{0, schedule.warps, device::thread_index(), 0};
  while (index < schedule.loads()) {
    const Next now(schedule, index, warp);
    if (now.load.team != team.warps) {
      team.wait();  // the smaller teams' partial sums must not meet readers of the larger one's
      team.warps = now.load.team;
      team.first_warp = warp & ~(team.warps - 1);
      team.lane = device::thread_index() - team.first_warp * kLanes;
    }
    Row<Rule, Grad> row{};
    if (now.some) {
      row = row_of<Grad>(step, arrays, ahead);
      row.clipped = step.clipped ? step.clipped + now.unit : nullptr;
    }
    device::warp_wait();  // all lanes have read what the next unit's is written over
    index += device::grid_blocks();
    if constexpr (std::is_same_v<Grad, NoGrad>) {
      look_ahead();
      if (now.some) write_only(row, team, shared);
    } else if (now.some && !now.load.is_long && edge_count(row.span) <= kLanes) {
      resident_unit(row, unscale, team, shared, look_ahead, [&] {
        device::warp_wait();
        const Next next(schedule, index, warp);
        const int lanes = next.load.team * kLanes;
        if (next.some) prefetch(row_of<Grad>(step, arrays, ahead), device::thread_index() % lanes, lanes);
      });
    } else {
      look_ahead();
      if (now.some) long_unit(row, unscale, team, shared);
    }
    device::warp_wait();
  }
}

}  // namespace boosterbit
