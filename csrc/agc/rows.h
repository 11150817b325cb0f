// How units are sorted and spread over a GPU: size classes, and loads of a block. Host and device share this, so that
// the CPU tests cover it.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace boosterbit {

// A team of 1, 2, 4, 8 or 16 warps holds a unit on chip: parameter and gradient in shared memory, momentum in registers.
// Each lane has room for kSlots vectors of 4 elements, so a warp for 1,152 elements, and 16 warps for 18,432: the largest
// row of a BiT network. Longer units are read twice.
constexpr int kLanes = 32;
constexpr int kVector = 4;
constexpr int kSlots = 9;
constexpr int kWarpElements = kLanes * kSlots * kVector;
constexpr int kMaxWarps = 16;
constexpr int kMinBlockWarps = 4;
constexpr int kClasses = 6;

// Warps of a team of size class 1, 2 … 5: 16, 8 … 1. Class 0 is of the units too long for any; a whole block takes one.
BOOSTERBIT_MATH int team_warps(int size_class) { return size_class == 0 ? kMaxWarps : kMaxWarps >> (size_class - 1); }

// The class of the smallest team that can hold `length` elements.
BOOSTERBIT_MATH int size_class(int64_t length) {
  for (int c = kClasses - 1; c > 0; --c) {
    if (length <= static_cast<int64_t>(team_warps(c)) * kWarpElements) return c;
  }
  return 0;
}

// How many units there are of each class, in the order of the table: the longest first, so that the short ones fill
// what these leave.
struct ClassCounts {
  int64_t count[kClasses];
};

// How a block's work is cut. A load is what it takes at once: a unit for each of the teams that it divides into. Block b
// of n takes the loads b, b + n, b + 2n …; all loads are of similar size, so blocks differ by one load at the most.
struct Schedule {
  int warps;                     // of a block
  int64_t load_end[kClasses];    // loads of this class and those before it
  int64_t unit_begin[kClasses];  // first unit of this class
  int64_t unit_end[kClasses];

  BOOSTERBIT_MATH int64_t loads() const { return load_end[kClasses - 1]; }
};

// As many warps as the largest team needs, so that small models get small blocks, which balance better; but no more than
// `most`, a power of two, the warps whose share of shared memory the device has. Units of larger teams count as long.
inline Schedule schedule_of(const ClassCounts& classes, int most = kMaxWarps) {
  Schedule schedule{kMinBlockWarps < most ? kMinBlockWarps : most, {}, {}, {}};
  for (int c = 0; c < kClasses; ++c) {
    const int wanted = team_warps(c) < most ? team_warps(c) : most;
    if (classes.count[c] > 0 && wanted > schedule.warps) schedule.warps = wanted;
  }
  int64_t loads = 0, units = 0;
  for (int c = 0; c < kClasses; ++c) {
    const int teams = team_warps(c) < schedule.warps ? schedule.warps / team_warps(c) : 1;
    schedule.unit_begin[c] = units;
    units += classes.count[c];
    loads += (classes.count[c] + teams - 1) / teams;
    schedule.unit_end[c] = units;
    schedule.load_end[c] = loads;
  }
  return schedule;
}

// One load: the warps of each team, and the units, of which team t has the one at first + t.
struct Load {
  int team;
  bool is_long;  // too long for the team to hold
  int64_t first;
  int64_t end;  // units of the class end here: later teams have none
};

// `index` is less than schedule.loads().
BOOSTERBIT_MATH Load find_load(const Schedule& schedule, int64_t index) {
  int c = 0;
  while (c < kClasses - 1 && index >= schedule.load_end[c]) ++c;
  const int64_t before = c == 0 ? 0 : schedule.load_end[c - 1];
  const int team = team_warps(c) < schedule.warps ? team_warps(c) : schedule.warps;
  return Load{team, c == 0 || team_warps(c) > team, schedule.unit_begin[c] + (index - before) * (schedule.warps / team),
              schedule.unit_end[c]};
}

// A unit as vectors of 4 elements that lie at multiples of their size, and the few elements before and after them.
struct Span {
  int64_t length;
  int64_t vectors;
  int head;  // elements before the first vector
};

// `phase`: elements from the last multiple of a vector's size to the unit's first. `aligned` false: no vectors at all.
BOOSTERBIT_MATH Span span_of(int64_t length, int phase, bool aligned) {
  if (!aligned) return Span{length, 0, 0};
  int head = (kVector - phase) % kVector;
  if (head > length) head = static_cast<int>(length);
  return Span{length, (length - head) / kVector, head};
}

// First element of a vector; its edges, the elements in no vector, and the element that an edge is.
BOOSTERBIT_MATH int64_t vector_start(const Span& s, int64_t vector) { return s.head + vector * kVector; }
BOOSTERBIT_MATH int64_t edge_count(const Span& s) { return s.length - s.vectors * kVector; }
BOOSTERBIT_MATH int64_t edge_index(const Span& s, int64_t edge) {
  return edge < s.head ? edge : edge + s.vectors * kVector;
}

}  // namespace boosterbit
