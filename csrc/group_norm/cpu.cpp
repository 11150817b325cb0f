// Group norm and ReLU on the CPU: a piece of a sample is read for its sums, and written while it is still in the cache.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../shared/cpu.h"
#include "api.h"
#include "scalar.h"

// Nothing is summed across the lanes of a vector, so that all processors (cpu.h) write the same bits.

namespace boosterbit {
namespace {

// Rows summed in float before the sums go to double.
constexpr int64_t kChunk = 64;
// Columns that a contiguous run is cut into. Fixed: the order of additions follows from it.
constexpr int64_t kRunColumns = 128;
// What a task reads: it should be in a core's second-level cache when it is read again.
constexpr int64_t kTaskBytes = 768 << 10;
constexpr int64_t kLineBytes = 64;

template <class T>
INLINE float value(T x) {
  return static_cast<float>(x);
}

// A piece of memory as a matrix: `rows` of `columns` elements that lie together, `stride` elements from row to row.
// Channels-last, a column is a channel; in a contiguous run it is every kRunColumns-th element. Each column has its own
// sums, whoever works on it: results do not depend on threads, nor on the width of vectors.
struct Matrix {
  int64_t rows, columns, stride;
};

// Room for what one task holds a column each, kept from task to task.
struct Columns {
  std::vector<float> mean, scale, beta, offset, slope, sum, squares;
  std::vector<Moments> moments;
  std::vector<double> sums, sums_x;

  void resize(int64_t n) {
    for (auto* floats : {&mean, &scale, &beta, &offset, &slope, &sum, &squares}) floats->resize(n);
    moments.resize(n);
    sums.resize(n);
    sums_x.resize(n);
  }
};

template <class T>
INLINE void add_differences(const T* x, const Matrix& m, int64_t first, int64_t last, const float* __restrict__ shift,
                            float* __restrict__ sum, float* __restrict__ squares) {
  const int64_t n = m.columns;
  std::fill_n(sum, n, 0.0f);
  std::fill_n(squares, n, 0.0f);
  int64_t r = first;
  for (; r + 4 <= last; r += 4) {
    const T *a = x + r * m.stride, *b = a + m.stride, *c = b + m.stride, *d = c + m.stride;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float k = shift[j];
      const float e = value(a[j]) - k, f = value(b[j]) - k, g = value(c[j]) - k, h = value(d[j]) - k;
      sum[j] += (e + f) + (g + h);
      squares[j] += (e * e + f * f) + (g * g + h * h);
    }
  }
  for (; r < last; ++r) {
    const T* a = x + r * m.stride;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      const float e = value(a[j]) - shift[j];
      sum[j] += e;
      squares[j] += e * e;
    }
  }
}

// The moments of each column. The shift is the mean so far; at first the first row, then the mean of the first chunk,
// which is read twice.
template <class T>
INLINE void moments_of(const T* x, const Matrix& m, Columns& at) {
  float *shift = at.mean.data(), *sum = at.sum.data(), *squares = at.squares.data();
  Moments* moments = at.moments.data();
  for (int64_t j = 0; j < m.columns; ++j) moments[j] = Moments{0.0, 0.0, 0.0};
  if (m.rows == 0) return;
  const int64_t chunk = std::min(kChunk, m.rows);
  for (int64_t j = 0; j < m.columns; ++j) shift[j] = value(x[j]);
  add_differences(x, m, 0, chunk, shift, sum, squares);
  for (int64_t j = 0; j < m.columns; ++j) shift[j] += sum[j] / static_cast<float>(chunk);
  for (int64_t first = 0; first < m.rows; first += kChunk) {
    const int64_t last = std::min(first + kChunk, m.rows);
    add_differences(x, m, first, last, shift, sum, squares);
    for (int64_t j = 0; j < m.columns; ++j) {
      moments[j] = add_shifted(moments[j], shift[j], static_cast<double>(last - first), sum[j], squares[j]);
      shift[j] = static_cast<float>(moments[j].mean);
    }
  }
}

template <class T>
INLINE void write_output(const T* __restrict__ x, T* __restrict__ y, const Matrix& m, const Columns& at) {
  const float *__restrict__ mean = at.mean.data(), *__restrict__ scale = at.scale.data(),
                            *__restrict__ beta = at.beta.data();
  for (int64_t r = 0; r < m.rows; ++r) {
    const T* from = x + r * m.stride;
    T* to = y + r * m.stride;
#pragma omp simd
    for (int64_t j = 0; j < m.columns; ++j) to[j] = cast<T>(relu(normalized(value(from[j]), mean[j], scale[j], beta[j])));
  }
}

// Adds to each column's sums of the gradient behind the ReLU, and of it times (x - mean).
template <class T>
INLINE void add_gradients(const T* __restrict__ x, const T* __restrict__ grad, const Matrix& m, Columns& at) {
  const float *__restrict__ mean = at.mean.data(), *__restrict__ scale = at.scale.data(),
                            *__restrict__ beta = at.beta.data();
  float *__restrict__ sum = at.sum.data(), *__restrict__ sum_x = at.squares.data();
  const int64_t n = m.columns;
  for (int64_t first = 0; first < m.rows; first += kChunk) {
    const int64_t last = std::min(first + kChunk, m.rows);
    std::fill_n(sum, n, 0.0f);
    std::fill_n(sum_x, n, 0.0f);
    int64_t r = first;
    for (; r + 2 <= last; r += 2) {
      const T *x0 = x + r * m.stride, *x1 = x0 + m.stride, *g0 = grad + r * m.stride, *g1 = g0 + m.stride;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float d0 = value(x0[j]) - mean[j], d1 = value(x1[j]) - mean[j];
        const float e0 = relu_gradient(d0 * scale[j] + beta[j], value(g0[j]));
        const float e1 = relu_gradient(d1 * scale[j] + beta[j], value(g1[j]));
        sum[j] += e0 + e1;
        sum_x[j] += e0 * d0 + e1 * d1;
      }
    }
    for (; r < last; ++r) {
      const T *x0 = x + r * m.stride, *g0 = grad + r * m.stride;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const float d0 = value(x0[j]) - mean[j];
        const float e0 = relu_gradient(d0 * scale[j] + beta[j], value(g0[j]));
        sum[j] += e0;
        sum_x[j] += e0 * d0;
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      at.sums[j] += sum[j];
      at.sums_x[j] += sum_x[j];
    }
  }
}

// Of an element that is `apart` from the mean, for the gradient `grad` behind the ReLU.
INLINE float input_gradient_at(float apart, float grad, float scale, float beta, float offset, float slope) {
  return scale * relu_gradient(apart * scale + beta, grad) - offset - slope * apart;
}

template <class T>
INLINE void write_gradient(const T* __restrict__ x, const T* __restrict__ grad, const T* __restrict__ shortcut,
                           T* __restrict__ grad_x, const Matrix& m, const Columns& at) {
  const float *__restrict__ mean = at.mean.data(), *__restrict__ scale = at.scale.data(),
                            *__restrict__ beta = at.beta.data(), *__restrict__ offset = at.offset.data(),
                            *__restrict__ slope = at.slope.data();
  for (int64_t r = 0; r < m.rows; ++r) {
    const T *from = x + r * m.stride, *g = grad + r * m.stride;
    T* to = grad_x + r * m.stride;
    if (shortcut == nullptr) {
#pragma omp simd
      for (int64_t j = 0; j < m.columns; ++j)
        to[j] = cast<T>(input_gradient_at(value(from[j]) - mean[j], value(g[j]), scale[j], beta[j], offset[j], slope[j]));
    } else {
      const T* more = shortcut + r * m.stride;
#pragma omp simd
      for (int64_t j = 0; j < m.columns; ++j)
        to[j] = cast<T>(input_gradient_at(value(from[j]) - mean[j], value(g[j]), scale[j], beta[j], offset[j], slope[j]) +
                        value(more[j]));
    }
  }
}

// Calls `work(start, matrix)` for a contiguous run of `length` elements: whole rows, then what is left as one.
template <class Work>
INLINE void over_run(int64_t length, Work work) {
  const int64_t rows = length / kRunColumns, left = length % kRunColumns;
  if (rows > 0) work(int64_t{0}, Matrix{rows, kRunColumns, kRunColumns});
  if (left > 0) work(rows * kRunColumns, Matrix{1, left, left});
}

// What lies `elements` on, or nothing where there is nothing.
template <class T>
INLINE const T* beyond(const T* x, int64_t elements) {
  return x == nullptr ? nullptr : x + elements;
}

INLINE void fill(std::vector<float>& column, int64_t n, float x) { std::fill_n(column.data(), n, x); }

// Groups `first` to `last` of a sample, of `size` channels each.
struct Piece {
  int64_t sample, first, last, size;
};

template <class T>
INLINE void forward_channels_last(const NormForward& call, const Piece& piece, Columns& at) {
  const NormShape& s = call.shape;
  const int64_t begin = piece.first * piece.size, start = piece.sample * s.pixels * s.channels + begin;
  const Matrix m{s.pixels, (piece.last - piece.first) * piece.size, s.channels};
  const T* x = static_cast<const T*>(call.x) + start;
  moments_of(x, m, at);
  for (int64_t g = piece.first, j = 0; g < piece.last; ++g) {
    Moments group{0.0, 0.0, 0.0};
    for (int64_t c = 0; c < piece.size; ++c) group = merge(group, at.moments[j + c]);
    const float mean = static_cast<float>(group.mean), inverse = inverse_deviation(group, call.eps);
    call.mean[piece.sample * s.groups + g] = mean;
    call.inverse[piece.sample * s.groups + g] = inverse;
    for (int64_t c = 0; c < piece.size; ++c, ++j) {
      at.mean[j] = mean;
      at.scale[j] = call.gamma[begin + j] * inverse;
      at.beta[j] = call.beta[begin + j];
    }
  }
  write_output(x, static_cast<T*>(call.y) + start, m, at);
}

template <class T>
INLINE void forward_contiguous(const NormForward& call, const Piece& piece, Columns& at) {
  const NormShape& s = call.shape;
  for (int64_t g = piece.first; g < piece.last; ++g) {
    const int64_t begin = g * piece.size, start = (piece.sample * s.channels + begin) * s.pixels;
    const T* x = static_cast<const T*>(call.x) + start;
    Moments group{0.0, 0.0, 0.0};
    over_run(piece.size * s.pixels, [&](int64_t from, const Matrix& m) {
      moments_of(x + from, m, at);
      for (int64_t j = 0; j < m.columns; ++j) group = merge(group, at.moments[j]);
    });
    const float mean = static_cast<float>(group.mean), inverse = inverse_deviation(group, call.eps);
    call.mean[piece.sample * s.groups + g] = mean;
    call.inverse[piece.sample * s.groups + g] = inverse;
    fill(at.mean, kRunColumns, mean);
    for (int64_t c = 0; c < piece.size; ++c) {
      fill(at.scale, kRunColumns, call.gamma[begin + c] * inverse);
      fill(at.beta, kRunColumns, call.beta[begin + c]);
      T* y = static_cast<T*>(call.y) + start + c * s.pixels;
      over_run(s.pixels,
               [&](int64_t from, const Matrix& m) { write_output(x + c * s.pixels + from, y + from, m, at); });
    }
  }
}

// The sums over a channel of a sample, as gradients of its gamma and beta.
INLINE void write_parts(const NormBackward& call, int64_t sample, int64_t channel, float inverse, double sum,
                        double sum_x) {
  call.gamma_parts[sample * call.shape.channels + channel] = static_cast<float>(sum_x * inverse);
  call.beta_parts[sample * call.shape.channels + channel] = static_cast<float>(sum);
}

template <class T>
INLINE void backward_channels_last(const NormBackward& call, const Piece& piece, Columns& at) {
  const NormShape& s = call.shape;
  const int64_t begin = piece.first * piece.size, start = piece.sample * s.pixels * s.channels + begin;
  const Matrix m{s.pixels, (piece.last - piece.first) * piece.size, s.channels};
  const T *x = static_cast<const T*>(call.x) + start, *grad = static_cast<const T*>(call.grad) + start;
  const float *means = call.mean + piece.sample * s.groups, *inverses = call.inverse + piece.sample * s.groups;
  for (int64_t g = piece.first, j = 0; g < piece.last; ++g) {
    for (int64_t c = 0; c < piece.size; ++c, ++j) {
      at.mean[j] = means[g];
      at.scale[j] = call.gamma[begin + j] * inverses[g];
      at.beta[j] = call.beta[begin + j];
      at.sums[j] = at.sums_x[j] = 0.0;
    }
  }
  add_gradients(x, grad, m, at);
  for (int64_t g = piece.first, j = 0; g < piece.last; ++g) {
    double sum = 0.0, sum_x = 0.0;
    for (int64_t c = 0; c < piece.size; ++c) {
      const double gamma = call.gamma[begin + j + c];
      sum += gamma * at.sums[j + c];
      sum_x += gamma * at.sums_x[j + c];
    }
    const InputGradient in = input_gradient(sum, sum_x, static_cast<double>(piece.size * s.pixels), inverses[g]);
    for (int64_t c = 0; c < piece.size; ++c, ++j) {
      at.offset[j] = in.offset;
      at.slope[j] = in.slope;
      write_parts(call, piece.sample, begin + j, inverses[g], at.sums[j], at.sums_x[j]);
    }
  }
  const T* shortcut = beyond(static_cast<const T*>(call.shortcut), start);
  write_gradient(x, grad, shortcut, static_cast<T*>(call.grad_x) + start, m, at);
}

template <class T>
INLINE void backward_contiguous(const NormBackward& call, const Piece& piece, Columns& at) {
  const NormShape& s = call.shape;
  const auto prepare = [&](int64_t channel, float inverse) {
    fill(at.scale, kRunColumns, call.gamma[channel] * inverse);
    fill(at.beta, kRunColumns, call.beta[channel]);
  };
  for (int64_t g = piece.first; g < piece.last; ++g) {
    const int64_t begin = g * piece.size, start = (piece.sample * s.channels + begin) * s.pixels;
    const T *x = static_cast<const T*>(call.x) + start, *grad = static_cast<const T*>(call.grad) + start;
    const T* shortcut = beyond(static_cast<const T*>(call.shortcut), start);
    T* grad_x = static_cast<T*>(call.grad_x) + start;
    const float inverse = call.inverse[piece.sample * s.groups + g];
    fill(at.mean, kRunColumns, call.mean[piece.sample * s.groups + g]);
    double group = 0.0, group_x = 0.0;
    for (int64_t c = 0; c < piece.size; ++c) {
      prepare(begin + c, inverse);
      std::fill_n(at.sums.data(), kRunColumns, 0.0);
      std::fill_n(at.sums_x.data(), kRunColumns, 0.0);
      over_run(s.pixels, [&](int64_t from, const Matrix& m) {
        add_gradients(x + c * s.pixels + from, grad + c * s.pixels + from, m, at);
      });
      double sum = 0.0, sum_x = 0.0;
      for (int64_t j = 0; j < kRunColumns; ++j) {
        sum += at.sums[j];
        sum_x += at.sums_x[j];
      }
      const double gamma = call.gamma[begin + c];
      group += gamma * sum;
      group_x += gamma * sum_x;
      write_parts(call, piece.sample, begin + c, inverse, sum, sum_x);
    }
    const InputGradient in = input_gradient(group, group_x, static_cast<double>(piece.size * s.pixels), inverse);
    fill(at.offset, kRunColumns, in.offset);
    fill(at.slope, kRunColumns, in.slope);
    for (int64_t c = 0; c < piece.size; ++c) {
      prepare(begin + c, inverse);
      over_run(s.pixels, [&](int64_t from, const Matrix& m) {
        const int64_t at_run = c * s.pixels + from;
        write_gradient(x + at_run, grad + at_run, beyond(shortcut, at_run), grad_x + at_run, m, at);
      });
    }
  }
}

template <class T>
INLINE void work(const NormForward& call, const Piece& piece, Columns& at) {
  call.shape.channels_last ? forward_channels_last<T>(call, piece, at) : forward_contiguous<T>(call, piece, at);
}

template <class T>
INLINE void work(const NormBackward& call, const Piece& piece, Columns& at) {
  call.shape.channels_last ? backward_channels_last<T>(call, piece, at) : backward_contiguous<T>(call, piece, at);
}

// Groups of a task: such that what it reads, `tensors` of the activations' size, stays in the cache, and that all
// threads have work. Channels-last, a part of the groups would not stay there any better than all of them: the lines
// of a few columns, a power of two apart, fall into a few of the cache's sets. So rows are read as they lie.
int64_t groups_of_a_task(const NormShape& s, int tensors, int threads) {
  const int64_t size = s.channels / s.groups, element = s.dtype == Dtype::f32 ? 4 : 2;
  const int64_t bytes = size * s.pixels * element * tensors;
  int64_t groups = s.channels_last ? s.groups : std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, bytes));
  groups = std::min(groups, s.groups);
  if (s.batch % threads != 0 && s.batch < 4 * threads) groups = std::min(groups, (s.groups + threads - 1) / threads);
  groups = std::max<int64_t>(1, groups);
  if (!s.channels_last) return groups;
  // Whole lines: else two tasks share one, and the columns beside whole vectors go one at a time.
  int64_t lines = groups;
  while (lines < s.groups && lines * size * element % kLineBytes != 0) ++lines;
  return lines;
}

template <class T, class Call>
void run(const Call& call, int tensors) {
  const NormShape& s = call.shape;
  const int64_t groups = groups_of_a_task(s, tensors, at::get_num_threads()), size = s.channels / s.groups;
  const int64_t pieces = (s.groups + groups - 1) / groups;
  at::parallel_for(0, s.batch * pieces, 1, [&](int64_t begin, int64_t end) {
    Columns columns;
    columns.resize(std::max(s.channels_last ? groups * size : kRunColumns, int64_t{1}));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t % pieces * groups;
      const Piece piece{t / pieces, first, std::min(first + groups, s.groups), size};
      on_this_processor([&](auto) INLINE_BODY { work<T>(call, piece, columns); });
    }
  });
}

}  // namespace

void group_norm_relu_cpu(const NormForward& call) {
  switch (call.shape.dtype) {
    case Dtype::f16: run<c10::Half>(call, 1); break;
    case Dtype::bf16: run<c10::BFloat16>(call, 1); break;
    default: run<float>(call, 1);
  }
}

void group_norm_relu_backward_cpu(const NormBackward& call) {
  switch (call.shape.dtype) {
    case Dtype::f16: run<c10::Half>(call, 2); break;
    case Dtype::bf16: run<c10::BFloat16>(call, 2); break;
    default: run<float>(call, 2);
  }
  // Sample after sample, whichever thread made them.
  const int64_t channels = call.shape.channels, batch = call.shape.batch;
  for (int64_t c = 0; c < channels; ++c) {
    double gamma = 0.0, beta = 0.0;
    for (int64_t n = 0; n < batch; ++n) {
      gamma += call.gamma_parts[n * channels + c];
      beta += call.beta_parts[n * channels + c];
    }
    call.grad_gamma[c] = static_cast<float>(gamma);
    call.grad_beta[c] = static_cast<float>(beta);
  }
}

}  // namespace boosterbit
