// How units are sorted and spread over a GPU: size classes, and loads of a block. Host and device share this, so that
// the CPU tests cover it.
#pragma once

#include <cstdint>

#include "agc_sgd_math.h"

namespace boosterbit {

// A team of 1, 2, 4 … 32 warps holds a unit on chip: parameter and gradient in shared memory, momentum in registers.
// Each lane has room for kSlots vectors of 4 elements, so a warp for 640 elements, and 32 warps for 20,480; the largest
// row of a BiT network is 18,432. Longer units are read twice.
constexpr int kLanes = 32;
constexpr int kVector = 4;
constexpr int kSlots = 5;
constexpr int kWarpVectors = kLanes * kSlots;
constexpr int kMaxWarps = 32;
constexpr int kMinBlockWarps = 8;
constexpr int kClasses = 7;

// Warps of a team of size class 1, 2 … 6: 32, 16 … 1. Class 0 is of the units too long for any; a whole block takes one.
BOOSTERBIT_MATH int team_warps(int size_class) { return size_class == 0 ? kMaxWarps : kMaxWarps >> (size_class - 1); }

// The class of the smallest team that can hold `length` elements wherever the first lies in its 16 bytes.
BOOSTERBIT_MATH int size_class(int64_t length) {
  const int64_t vectors = (length + 2 * (kVector - 1)) / kVector;
  for (int c = kClasses - 1; c > 0; --c) {
    if (vectors <= static_cast<int64_t>(team_warps(c)) * kWarpVectors) return c;
  }
  return 0;
}

// How many units there are of each class, in the order of the table: the longest first, so that the short ones fill
// what these leave.
struct ClassCounts {
  int64_t count[kClasses];
};

// Warps of a block: as many as the largest team needs, so that small models get small blocks, which balance better.
BOOSTERBIT_MATH int block_warps(const ClassCounts& classes) {
  for (int c = 0; c < kClasses; ++c) {
    if (classes.count[c] > 0) return team_warps(c) > kMinBlockWarps ? team_warps(c) : kMinBlockWarps;
  }
  return kMinBlockWarps;
}

// A load is what a block takes at once: a unit for each of the teams that it divides into. Block b of n takes the loads
// b, b + n, b + 2n …; all loads are of similar size, so blocks differ by one load at the most.
struct Load {
  int size_class;  // kClasses: there is no such load
  int64_t first;   // unit of the first team; team t has unit first + t
  int64_t end;     // first unit of the next class
};

BOOSTERBIT_MATH int teams_of(int size_class, int warps) { return size_class == 0 ? 1 : warps / team_warps(size_class); }

BOOSTERBIT_MATH int64_t loads_of(int size_class, int64_t count, int warps) {
  const int teams = teams_of(size_class, warps);
  return (count + teams - 1) / teams;
}

BOOSTERBIT_MATH int64_t count_loads(const ClassCounts& classes, int warps) {
  int64_t loads = 0;
  for (int c = 0; c < kClasses; ++c) loads += loads_of(c, classes.count[c], warps);
  return loads;
}

BOOSTERBIT_MATH Load find_load(const ClassCounts& classes, int warps, int64_t index) {
  int64_t unit = 0;
  for (int c = 0; c < kClasses; ++c) {
    const int64_t loads = loads_of(c, classes.count[c], warps);
    if (index < loads) return Load{c, unit + index * teams_of(c, warps), unit + classes.count[c]};
    index -= loads;
    unit += classes.count[c];
  }
  return Load{kClasses, unit, unit};
}

// A unit seen as aligned vectors of 4 elements: the first may begin before it, the last end after it.
struct Vectors {
  int64_t length;
  int phase;  // elements of the first vector that lie before the unit
};

BOOSTERBIT_MATH int64_t vector_count(const Vectors& v) { return (v.length + v.phase + kVector - 1) / kVector; }

// First element of vector `index`, counted from the unit's; negative in a first vector that begins before it.
BOOSTERBIT_MATH int64_t vector_start(const Vectors& v, int64_t index) { return index * kVector - v.phase; }

BOOSTERBIT_MATH bool is_whole(const Vectors& v, int64_t start) { return start >= 0 && start + kVector <= v.length; }

}  // namespace boosterbit
