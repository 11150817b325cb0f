// How a normalization is spread over a GPU: tiles, parts of tiles, and what a block keeps on chip. Host and device share
// this, so that tests of it need no GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "api.h"
#include "scalar.h"

namespace boosterbit {

constexpr int kLanes = 32;
constexpr int kVectorBytes = 16;  // read and written at once
constexpr int kMinWarps = 2, kMaxWarps = 16;
constexpr int kMaxTileGroups = 64;
constexpr int64_t kMaxParts = 64;
// What the memory moves at least: a tile that is a multiple of it wide wastes nothing.
constexpr int64_t kSector = 32;
// A tile wider than a cache line gains nothing.
constexpr int64_t kLine = 128;
// A part that reads less is not worth the second launch.
constexpr int64_t kMinPartBytes = 16 << 10;
// Vectors of a thread; more threads than that makes would idle at the ends of a tile.
constexpr int64_t kThreadVectors = 8;

// A tile is some neighbouring groups of a sample. Channels-last it is a matrix of one row a pixel, cut into strips of
// `lanes` vectors; contiguous, each channel is a strip of one vector a row. A warp takes one strip, 32 / lanes of its
// rows at once; a block's warps take `side` strips side by side, and the rows in turns. Each thread keeps the first
// `kept` vectors of what it reads in shared memory, and reads what is more a second time, soon after, so that it may
// still be in the second-level cache.
struct NormPlan {
  bool wide;         // 16 bytes at once, else single elements
  int groups;        // of a tile; the last of a sample may have fewer
  int group_lanes;   // threads that add up the channels of a group: a power of 2
  int lanes;         // vectors of a strip's row: a power of 2
  int side;          // strips side by side: a power of 2
  int warps;         // of a block: a power of 2, no less than side
  int kept;          // vectors that a thread keeps, of each activation it reads
  int parts;         // blocks that share a tile: then two launches, which read all twice
  int rows;          // of a part
  int shared;        // bytes of a block's shared memory
  int64_t tiles;     // of a sample

  BOOSTERBIT_MATH int64_t blocks(const NormShape& s) const { return s.batch * tiles * parts; }
};

BOOSTERBIT_MATH int64_t vector_elements(const NormShape& s, bool wide) {
  return !wide ? 1 : s.dtype == Dtype::f32 ? kVectorBytes / 4 : kVectorBytes / 2;
}

// Rows of a tile.
BOOSTERBIT_MATH int64_t rows_of(const NormShape& s, bool wide) {
  return s.channels_last ? s.pixels : s.pixels / vector_elements(s, wide);
}

// Shared memory before the kept vectors: what is known of each group, then the sums of each warp's channels.
struct GroupMemory {
  double sums[kMaxTileGroups][2];
  float mean[kMaxTileGroups], inverse[kMaxTileGroups], offset[kMaxTileGroups], slope[kMaxTileGroups];
};
static_assert(sizeof(GroupMemory) % 16 == 0);

// Channels of a strip, of which each warp has two sums.
BOOSTERBIT_MATH int64_t strip_channels(const NormShape& s, const NormPlan& plan) {
  return s.channels_last ? plan.lanes * vector_elements(s, plan.wide) : 1;
}

BOOSTERBIT_MATH int64_t fixed_bytes(const NormShape& s, const NormPlan& plan) {
  return static_cast<int64_t>(sizeof(GroupMemory)) + plan.warps * strip_channels(s, plan) * 2 * 8;
}

constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int power_of_two(int64_t at_least) {
  int power = 1;
  while (power < at_least && power < (1 << 30)) power *= 2;
  return power;
}

// Groups of a tile, and whether its rows are read as vectors. `arrays`: how many activations are read.
inline void choose_tile(NormPlan& plan, const NormShape& s, bool aligned, int arrays, const NormDevice& device) {
  const int64_t size = s.channels / s.groups, element = s.dtype == Dtype::f32 ? 4 : 2;
  const int64_t vector = vector_elements(s, true);
  // Bytes that lie together: of a pixel's groups, or of all of a group.
  const int64_t together = size * element * (s.channels_last ? 1 : s.pixels);
  int64_t groups = 1, most = std::min<int64_t>(s.groups, kMaxTileGroups);
  plan.wide = aligned && (s.channels_last ? s.channels : s.pixels) % vector == 0;
  if (s.channels_last && plan.wide) {
    groups = kSector / std::gcd(together, kSector);
    if (groups * together > 2 * kLine) groups = kVectorBytes / std::gcd(together, int64_t{kVectorBytes});
    if (groups > 1 && groups * together > 2 * kLine) plan.wide = false, groups = 1;
  }
  if (s.channels_last && !plan.wide) groups = up(kSector, together);
  groups = std::min(groups, most);
  const int64_t limit = s.channels_last ? kLine : kMinPartBytes / 2;
  const auto enough = [&](int64_t n) { return s.batch * up(s.groups, n) >= 4 * device.processors; };
  const auto bytes = [&](int64_t n) { return n * size * s.pixels * element * arrays; };
  while (2 * groups <= most && 2 * groups * together <= limit && enough(2 * groups) &&
         bytes(2 * groups) <= device.shared_processor / 4)
    groups *= 2;
  plan.groups = static_cast<int>(groups);
  plan.group_lanes = std::min(power_of_two(size), kLanes);
  plan.tiles = up(s.groups, groups);
}

// How a tile is cut for the blocks of `device`. `aligned`: all activations lie at multiples of 16 bytes.
inline NormPlan norm_plan(const NormShape& s, bool aligned, int arrays, const NormDevice& device) {
  NormPlan plan{};
  choose_tile(plan, s, aligned, arrays, device);
  const int64_t element = s.dtype == Dtype::f32 ? 4 : 2, vector = vector_elements(s, plan.wide);
  const int64_t channels = plan.groups * (s.channels / s.groups), rows = rows_of(s, plan.wide);
  const int64_t columns = s.channels_last ? up(channels, vector) : 1;
  plan.lanes = std::min(power_of_two(columns), plan.wide ? static_cast<int>(kLine / kVectorBytes) : kLanes);
  const int64_t strips = s.channels_last ? up(columns, plan.lanes) : channels;

  // One block for each tile leaves a GPU idle where tiles are few.
  const int64_t blocks = s.batch * plan.tiles, bytes = channels * s.pixels * element * arrays;
  int64_t parts = 1;
  if (blocks > 0 && blocks < device.processors) {
    const int64_t wanted = std::min(up(2 * device.processors, blocks), bytes / kMinPartBytes);
    parts = std::max<int64_t>(1, std::min({wanted, kMaxParts, rows}));
  }
  plan.rows = static_cast<int>(std::max<int64_t>(1, up(rows, parts)));
  plan.parts = static_cast<int>(std::max<int64_t>(1, up(rows, plan.rows)));

  // Blocks of 8 warps that leave room for another one on the same processor; else one of 16 that has it for itself.
  const auto slots = [&](int warps) {
    plan.warps = warps;
    plan.side = std::min(warps, power_of_two(strips));
    return up(strips, plan.side) * up(plan.rows, warps / plan.side * (kLanes / plan.lanes));
  };
  const int64_t slot = vector * element * arrays * kLanes, half = device.shared_processor / 2 - 1024;
  const int64_t wanted = strips * plan.lanes * plan.rows / (kLanes * kThreadVectors);
  int64_t kept = slots(std::clamp(power_of_two(wanted), kMinWarps, kMaxWarps / 2));
  if (fixed_bytes(s, plan) + kept * plan.warps * slot > half) {
    kept = slots(kMaxWarps);
    const int64_t room = (device.shared_block - fixed_bytes(s, plan)) / (plan.warps * slot);
    kept = std::max<int64_t>(1, std::min(kept, room));
  }
  plan.kept = static_cast<int>(kept);
  plan.shared = static_cast<int>(fixed_bytes(s, plan) + kept * plan.warps * slot);
  return plan;
}

}  // namespace boosterbit
