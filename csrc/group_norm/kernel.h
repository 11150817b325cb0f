// What a block of the CUDA kernels does. Written against a few primitives that the includer defines before: cuda.cu with
// those of CUDA, and tests/csrc/emulated_group_norm.cpp with ones that run on a CPU.
#pragma once

#include "../shared/device.h"
#include "tiles.h"

namespace boosterbit {

// What a launch does: all, or where blocks share a tile first the sums and then the rest.
enum Phase { kSums = 1, kRest = 2, kAll = 3 };

// Of a group in a part of its tile: mean and sum of squared differences from it, or the two sums of the backward pass.
struct GroupSums {
  double first, second;
};

constexpr int kChunk = 64;  // rows summed in float before the sums go to double

// A tile's part, and what of it this thread reads: the rows row, row + stride … before `end` of its strip in each round,
// at its place in the strip's row.
template <class T, int N, bool Last>
struct Tile {
  static constexpr int kChannels = Last ? N : 1;  // of a vector

  int64_t sample, start;             // start: its first element
  int first, part;                   // first: of its groups, in the sample
  int row, stride, end;              // of what this thread reads
  int row_step, size;                // elements from row to row; channels of a group
  int channels, columns;             // of the tile; vectors of a row
  int64_t strip_step;                // elements from strip to strip
  int kept, groups, lanes, side, strip, column, rounds, warps, group_lanes;

  DEVICE Tile(const NormShape& s, const NormPlan& plan, int64_t index)
      : sample(index / plan.parts / plan.tiles),
        first(static_cast<int>(index / plan.parts % plan.tiles) * plan.groups),
        part(static_cast<int>(index % plan.parts)),
        size(static_cast<int>(s.channels / s.groups)),
        kept(plan.kept),
        lanes(plan.lanes),
        side(plan.side),
        warps(plan.warps),
        group_lanes(plan.group_lanes) {
    const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
    const int left = static_cast<int>(s.groups) - first, pixels = static_cast<int>(s.pixels);
    groups = plan.groups < left ? plan.groups : left;
    channels = groups * size;
    columns = Last ? channels / N : channels;
    strip_step = Last ? lanes * N : pixels;
    row_step = Last ? static_cast<int>(s.channels) : N;
    start = sample * s.pixels * s.channels + static_cast<int64_t>(first) * size * (Last ? 1 : pixels);
    const int rows = Last ? pixels : pixels / N, begin = part * plan.rows;
    end = plan.rows < rows - begin ? begin + plan.rows : rows;
    row = begin + warp / side * (kLanes / lanes) + lane / lanes;
    stride = warps / side * (kLanes / lanes);
    strip = warp % side;
    column = lane % lanes;
    rounds = (columns + lanes * side - 1) / (lanes * side);
  }

  DEVICE int threads() const { return warps * kLanes; }
  // Elements of a group in a part.
  DEVICE double count(const NormShape& s, const NormPlan& plan, int of_part) const {
    const int rows = static_cast<int>(Last ? s.pixels : s.pixels / N), left = rows - of_part * plan.rows;
    return static_cast<double>(left < plan.rows ? left : plan.rows) * (Last ? 1 : N) * size;
  }
  // Vectors of the tile's row before this thread's, in a round.
  DEVICE int place(int round) const { return (round * side + strip) * lanes + column; }
  DEVICE bool has(int round) const { return place(round) < columns; }
  DEVICE int64_t element(int round, int of_row) const {
    return start + (round * side + strip) * strip_step + (Last ? column * N : 0) +
           static_cast<int64_t>(of_row) * row_step;
  }
  // The tile's channel of an element of this thread's vectors.
  DEVICE int channel(int round, int element) const { return place(round) * kChannels + element; }
  DEVICE int64_t statistic(const NormShape& s, int group) const { return sample * s.groups + first + group; }
  DEVICE void wait() const { device::barrier(0, threads()); }
};

// Shared memory of a block.
struct NormShared {
  GroupMemory group;

  DEVICE double (*channel_sums())[2] { return reinterpret_cast<double(*)[2]>(this + 1); }
};

// This thread's vectors on chip: `Arrays` activations, one after another, threads side by side.
template <class T, int N, bool Last>
DEVICE Vector<T, N>* kept_vectors(const Tile<T, N, Last>& t, NormShared& shared) {
  const int channels = Last ? t.lanes * N : 1;
  return reinterpret_cast<Vector<T, N>*>(shared.channel_sums() + t.warps * channels) + device::thread_index();
}

template <class T, int N, bool Last, int Arrays>
DEVICE void fetch(const Tile<T, N, Last>& t, const T* const (&from)[Arrays], NormShared& shared) {
  Vector<T, N>* own = kept_vectors(t, shared);
  for (int round = 0; round < t.rounds; ++round) {
    if (!t.has(round)) continue;
    for (int row = t.row, slot = round; row < t.end && slot < t.kept; row += t.stride, slot += t.rounds) {
#pragma unroll
      for (int a = 0; a < Arrays; ++a)
        device::copy_async(&own[(a * t.kept + slot) * t.threads()], from[a] + t.element(round, row));
    }
  }
  device::wait_for_copies();
}

// body(vectors, element) for each of this thread's vectors of a round that are on chip, and where `all`, for the others.
template <class T, int N, bool Last, int Arrays, class Body>
DEVICE void each(const Tile<T, N, Last>& t, const T* const (&from)[Arrays], NormShared& shared, int round, bool all,
                 const Body& body) {
  if (!t.has(round)) return;
  const Vector<T, N>* own = kept_vectors(t, shared);
  int row = t.row;
#pragma unroll(N > 1 ? 1 : 4)  // a wide vector has work enough for a thread, and more would want its registers
  for (int slot = round; row < t.end && slot < t.kept; row += t.stride, slot += t.rounds) {
    Vector<T, N> v[Arrays];
#pragma unroll
    for (int a = 0; a < Arrays; ++a) v[a] = own[(a * t.kept + slot) * t.threads()];
    body(v, t.element(round, row));
  }
  if (!all) return;
  constexpr int kAhead = 2 / Arrays;  // rows on their way at once
  for (; row < t.end; row += kAhead * t.stride) {
    Vector<T, N> ahead[kAhead][Arrays];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
#pragma unroll
      for (int a = 0; a < Arrays; ++a) {
        if (t.end - row > k * t.stride) ahead[k][a] = read<N>(from[a], t.element(round, row + k * t.stride));
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (t.end - row > k * t.stride) body(ahead[k], t.element(round, row + k * t.stride));
    }
  }
}

// Sums for each channel of a vector: over some rows, and over all, so that float is enough for a thread's.
template <int Sums, int C>
struct ChannelSums {
  float part[Sums][C] = {};
  float whole[Sums][C] = {};
  int rows = 0;

  DEVICE void end_row() {
    if (++rows % kChunk != 0) return;
#pragma unroll
    for (int n = 0; n < Sums; ++n) {
#pragma unroll
      for (int c = 0; c < C; ++c) whole[n][c] += part[n][c], part[n][c] = 0.0f;
    }
  }
  DEVICE double total(int n, int c) const { return static_cast<double>(whole[n][c]) + part[n][c]; }
};

// Adds up two sums of each channel of a round over the block, in a fixed order: own(n, c) are this thread's;
// channel(index, first, second) gets the block's, and the groups' sums get them times weight(index).
template <class T, int N, bool Last, class Own, class Channel, class Weight>
DEVICE void add_up(const Tile<T, N, Last>& t, NormShared& shared, int round, const Own& own, const Channel& channel,
                   const Weight& weight) {
  constexpr int C = Tile<T, N, Last>::kChannels;
  const int thread = device::thread_index(), warp = thread / kLanes, lane = thread % kLanes;
  const int of_strip = t.lanes * C, of_round = t.side * of_strip;
  double(*partial)[2] = shared.channel_sums();
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const double sum = device::warp_sum(own(n, c), kLanes / 2, t.lanes);
      if (lane < t.lanes) partial[warp * of_strip + lane * C + c][n] = sum;
    }
  }
  t.wait();
  const int before = round * of_round;
  for (int j = thread; j < of_round; j += t.threads()) {
    double first = 0.0, second = 0.0;
    for (int k = j; k < t.warps * of_strip; k += of_round) {
      first += partial[k][0];
      second += partial[k][1];
    }
    partial[j][0] = first;
    partial[j][1] = second;
    if (before + j < t.channels) channel(before + j, first, second);
  }
  t.wait();
  const int width = t.group_lanes;
  for (int begin = 0; begin < t.groups; begin += t.threads() / width) {
    const int group = begin + thread / width;
    double first = 0.0, second = 0.0;
    if (group < t.groups) {
      int low = group * t.size, high = low + t.size;
      if (low < before) low = before;
      if (high > before + of_round) high = before + of_round;
      for (int c = low + thread % width; c < high; c += width) {
        const double times = weight(c);
        first += times * partial[c - before][0];
        second += times * partial[c - before][1];
      }
    }
    first = device::warp_sum(first, width / 2);
    second = device::warp_sum(second, width / 2);
    if (group < t.groups && thread % width == 0) {
      double(&total)[2] = shared.group.sums[group];
      total[0] = (round == 0 ? 0.0 : total[0]) + first;
      total[1] = (round == 0 ? 0.0 : total[1]) + second;
    }
  }
  t.wait();
}

// Each group's sums over the parts of its tile, which another launch left: by one warp, in a fixed order. `combine` gets
// sum(part_value), which adds part_value(part, sums of that part) over all parts.
template <class T, int N, bool Last, class Combine>
DEVICE void from_parts(const Tile<T, N, Last>& t, const NormShape& s, const NormPlan& plan, const GroupSums* work,
                       const Combine& combine) {
  const int lane = device::thread_index() % kLanes;
  for (int group = device::thread_index() / kLanes; group < t.groups; group += t.warps) {
    const GroupSums* parts = work + t.statistic(s, group) * plan.parts;
    combine(group, [&](const auto& value) {
      double sum = 0.0;
      for (int p = lane; p < plan.parts; p += kLanes) sum += value(p, parts[p]);
      return device::warp_sum(sum);
    });
  }
}

// For each group of the tile the mean of what is on chip, and then the sums of all differences from it and of their
// squares. It is near the true mean, so that a large one cancels nothing: where a share f of the elements is on chip, it
// lies at most sigma / sqrt(f) away.
template <class T, int N, bool Last>
DEVICE void add_differences(const Tile<T, N, Last>& t, const T* const (&from)[1], NormShared& shared) {
  constexpr int C = Tile<T, N, Last>::kChannels;
  const auto nothing = [](int, double, double) {};
  const auto one = [](int) { return 1.0; };
  for (int round = 0; round < t.rounds; ++round) {
    ChannelSums<1, C> sums;
    float shift[C] = {};
    each(t, from, shared, round, false, [&](const Vector<T, N>(&v)[1], int64_t) {
      if (sums.rows == 0) {
#pragma unroll
        for (int c = 0; c < C; ++c) shift[c] = device::to_float(v[0].x[c]);
      }
#pragma unroll
      for (int e = 0; e < N; ++e) sums.part[0][Last ? e : 0] += device::to_float(v[0].x[e]) - shift[Last ? e : 0];
      sums.end_row();
    });
    const double elements = static_cast<double>(sums.rows) * (N / C);
    const auto own = [&](int n, int c) { return n == 0 ? sums.total(0, c) + elements * shift[c] : elements; };
    add_up(t, shared, round, own, nothing, one);
  }
  for (int group = device::thread_index(); group < t.groups; group += t.threads())
    shared.group.mean[group] = static_cast<float>(shared.group.sums[group][0] / shared.group.sums[group][1]);
  t.wait();
  for (int round = 0; round < t.rounds; ++round) {
    ChannelSums<2, C> sums;
    float mean[C] = {};
    if (t.has(round)) {
#pragma unroll
      for (int c = 0; c < C; ++c) mean[c] = shared.group.mean[t.channel(round, c) / t.size];
    }
    each(t, from, shared, round, true, [&](const Vector<T, N>(&v)[1], int64_t) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const int c = Last ? e : 0;
        const float apart = device::to_float(v[0].x[e]) - mean[c];
        sums.part[0][c] += apart;
        sums.part[1][c] += apart * apart;
      }
      sums.end_row();
    });
    add_up(t, shared, round, [&](int n, int c) { return sums.total(n, c); }, nothing, one);
  }
}

template <class T, int N, bool Last>
DEVICE void forward_tile(const Tile<T, N, Last>& t, const NormForward& call, const NormPlan& plan, int phase,
                         GroupSums* work, NormShared& shared) {
  constexpr int C = Tile<T, N, Last>::kChannels;
  const NormShape& s = call.shape;
  const T* const from[1] = {static_cast<const T*>(call.x)};
  const float *gamma = call.gamma + static_cast<int64_t>(t.first) * t.size;
  const float* beta = call.beta + static_cast<int64_t>(t.first) * t.size;
  const double all = static_cast<double>(t.size) * static_cast<double>(s.pixels);
  const auto know = [&](int group, double mean, double squares) {
    const Moments m{all, mean, squares > 0.0 ? squares : 0.0};
    const float inverse = inverse_deviation(m, call.eps);
    shared.group.mean[group] = static_cast<float>(mean);
    shared.group.inverse[group] = inverse;
    if (t.part == 0) {
      call.mean[t.statistic(s, group)] = static_cast<float>(mean);
      call.inverse[t.statistic(s, group)] = inverse;
    }
  };
  if (phase & kSums) {
    fetch(t, from, shared);
    const double count = t.count(s, plan, t.part);
    add_differences(t, from, shared);
    for (int group = device::thread_index(); group < t.groups; group += t.threads()) {
      const double apart = shared.group.sums[group][0] / count;
      const double mean = shared.group.mean[group] + apart;
      const double squares = shared.group.sums[group][1] - apart * shared.group.sums[group][0];
      if (phase & kRest) {
        know(group, mean, squares);
      } else {
        work[t.statistic(s, group) * plan.parts + t.part] = GroupSums{mean, squares};
      }
    }
  } else {
    from_parts(t, s, plan, work, [&](int group, const auto& sum) {
      const double mean = sum([&](int p, const GroupSums& g) { return t.count(s, plan, p) * g.first; }) / all;
      const double squares = sum([&](int p, const GroupSums& g) {
        return g.second + t.count(s, plan, p) * (g.first - mean) * (g.first - mean);
      });
      if (device::thread_index() % kLanes == 0) know(group, mean, squares);
    });
  }
  t.wait();
  if (!(phase & kRest)) return;
  T* to = static_cast<T*>(call.y);
  for (int round = 0; round < t.rounds; ++round) {
    if (!t.has(round)) continue;
    float means[C], scales[C], betas[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int channel = t.channel(round, c), group = channel / t.size;
      means[c] = shared.group.mean[group];
      scales[c] = gamma[channel] * shared.group.inverse[group];
      betas[c] = beta[channel];
    }
    each(t, from, shared, round, true, [&](const Vector<T, N>(&v)[1], int64_t at) {
      Vector<T, N> y;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const int c = Last ? e : 0;
        y.x[e] = device::from_float<T>(relu(normalized(device::to_float(v[0].x[e]), means[c], scales[c], betas[c])));
      }
      write(to, at, y);
    });
  }
}

template <class T, int N, bool Last>
DEVICE void backward_tile(const Tile<T, N, Last>& t, const NormBackward& call, const NormPlan& plan, int phase,
                          GroupSums* work, NormShared& shared) {
  constexpr int C = Tile<T, N, Last>::kChannels;
  const NormShape& s = call.shape;
  const T* const from[2] = {static_cast<const T*>(call.x), static_cast<const T*>(call.grad)};
  const float* gamma = call.gamma + static_cast<int64_t>(t.first) * t.size;
  const float* beta = call.beta + static_cast<int64_t>(t.first) * t.size;
  const auto mean_of = [&](int channel) { return call.mean[t.statistic(s, channel / t.size)]; };
  const auto inverse_of = [&](int channel) { return call.inverse[t.statistic(s, channel / t.size)]; };
  const auto know = [&](int group, double sum, double sum_x) {
    const double all = static_cast<double>(t.size) * static_cast<double>(s.pixels);
    const InputGradient in = input_gradient(sum, sum_x, all, call.inverse[t.statistic(s, group)]);
    shared.group.offset[group] = in.offset;
    shared.group.slope[group] = in.slope;
  };
  if (phase & kSums) {
    fetch(t, from, shared);
    const int64_t parts = (t.sample * plan.parts + t.part) * s.channels + static_cast<int64_t>(t.first) * t.size;
    for (int round = 0; round < t.rounds; ++round) {
      ChannelSums<2, C> sums;
      float means[C] = {}, scales[C] = {}, betas[C] = {};
      if (t.has(round)) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const int channel = t.channel(round, c);
          means[c] = mean_of(channel);
          scales[c] = gamma[channel] * inverse_of(channel);
          betas[c] = beta[channel];
        }
      }
      each(t, from, shared, round, true, [&](const Vector<T, N>(&v)[2], int64_t) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          const int c = Last ? e : 0;
          const float x = device::to_float(v[0].x[e]), apart = x - means[c];
          const float g = relu_gradient(normalized(x, means[c], scales[c], betas[c]), device::to_float(v[1].x[e]));
          sums.part[0][c] += g;
          sums.part[1][c] += g * apart;
        }
        sums.end_row();
      });
      add_up(
          t, shared, round, [&](int n, int c) { return sums.total(n, c); },
          [&](int channel, double sum, double sum_x) {
            call.gamma_parts[parts + channel] = static_cast<float>(sum_x * inverse_of(channel));
            call.beta_parts[parts + channel] = static_cast<float>(sum);
          },
          [&](int channel) { return static_cast<double>(gamma[channel]); });
    }
    for (int group = device::thread_index(); group < t.groups; group += t.threads()) {
      const double(&sums)[2] = shared.group.sums[group];
      if (phase & kRest) {
        know(group, sums[0], sums[1]);
      } else {
        work[t.statistic(s, group) * plan.parts + t.part] = GroupSums{sums[0], sums[1]};
      }
    }
  } else {
    from_parts(t, s, plan, work, [&](int group, const auto& sum) {
      const double first = sum([](int, const GroupSums& g) { return g.first; });
      const double second = sum([](int, const GroupSums& g) { return g.second; });
      if (device::thread_index() % kLanes == 0) know(group, first, second);
    });
  }
  t.wait();
  if (!(phase & kRest)) return;
  T* to = static_cast<T*>(call.grad_x);
  for (int round = 0; round < t.rounds; ++round) {
    if (!t.has(round)) continue;
    float means[C], scales[C], betas[C], offsets[C], slopes[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int channel = t.channel(round, c), group = channel / t.size;
      means[c] = mean_of(channel);
      scales[c] = gamma[channel] * inverse_of(channel);
      betas[c] = beta[channel];
      offsets[c] = shared.group.offset[group];
      slopes[c] = shared.group.slope[group];
    }
    each(t, from, shared, round, true, [&](const Vector<T, N>(&v)[2], int64_t at) {
      float gradients[N];
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const int c = Last ? e : 0;
        const float x = device::to_float(v[0].x[e]), apart = x - means[c];
        const float g = relu_gradient(normalized(x, means[c], scales[c], betas[c]), device::to_float(v[1].x[e]));
        gradients[e] = scales[c] * g - offsets[c] - slopes[c] * apart;
      }
      if (call.shortcut != nullptr) {
        const Vector<T, N> more = read<N>(static_cast<const T*>(call.shortcut), at);
#pragma unroll
        for (int e = 0; e < N; ++e) gradients[e] += device::to_float(more.x[e]);
      }
      Vector<T, N> dx;
#pragma unroll
      for (int e = 0; e < N; ++e) dx.x[e] = device::from_float<T>(gradients[e]);
      write(to, at, dx);
    });
  }
}

// A block's tiles: index, index + blocks …
template <class T, int N, bool Last, class Call>
DEVICE void run_tiles(const Call& call, const NormPlan& plan, int phase, GroupSums* work, NormShared& shared) {
  const int64_t count = plan.blocks(call.shape);
  for (int64_t index = device::block_index(); index < count; index += device::grid_blocks()) {
    const Tile<T, N, Last> tile(call.shape, plan, index);
    if constexpr (std::is_same_v<Call, NormForward>) {
      forward_tile(tile, call, plan, phase, work, shared);
    } else {
      backward_tile(tile, call, plan, phase, work, shared);
    }
    tile.wait();  // the next tile's statistics must not meet readers of this one's
  }
}

// The gradients of gamma and beta: their parts, which are those of `rows` samples or parts of samples, in that order.
constexpr int kSumWarps = 16;

struct PartSums {
  double sums[kSumWarps][kLanes][2];
};

DEVICE void add_parts(const NormBackward& call, int64_t rows, PartSums& shared) {
  const int warp = device::thread_index() / kLanes, lane = device::thread_index() % kLanes;
  const int64_t channels = call.shape.channels;
  for (int64_t first = device::block_index() * kLanes; first < channels; first += device::grid_blocks() * kLanes) {
    const int64_t channel = first + lane;
    double gamma = 0.0, beta = 0.0;
    if (channel < channels) {
#pragma unroll 4
      for (int64_t row = warp; row < rows; row += kSumWarps) {
        gamma += call.gamma_parts[row * channels + channel];
        beta += call.beta_parts[row * channels + channel];
      }
    }
    shared.sums[warp][lane][0] = gamma;
    shared.sums[warp][lane][1] = beta;
    device::barrier(0, kSumWarps * kLanes);
    if (warp == 0 && channel < channels) {
      for (int w = 1; w < kSumWarps; ++w) {
        gamma += shared.sums[w][lane][0];
        beta += shared.sums[w][lane][1];
      }
      call.grad_gamma[channel] = static_cast<float>(gamma);
      call.grad_beta[channel] = static_cast<float>(beta);
    }
    device::barrier(0, kSumWarps * kLanes);
  }
}

}  // namespace boosterbit
