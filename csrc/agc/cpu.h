// A step on the CPU, for any rule: each row is read for its norms, and updated while it is still in the cache.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <type_traits>
#include <vector>

#include "copy.h"
#include "passes.h"
#include "scalar.h"
#include "step.h"
#include "sums.h"

namespace boosterbit {
namespace {

template <class Processor, class Rule>
INLINE void copy_only(const Step<Rule>& step, const Arrays<Rule>* arrays, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit = step.units[u];
    const typename Rule::Hyper hyper = step.hyper[unit.group];
    Copy copy = copy_of(step, arrays[unit.tensor], unit, hyper);
    if (copy.standardized) {
      Moments moments;
      add<Processor>(copy.from, copy.n, moments);
      standardize(moments, hyper, copy);
    }
    write(step.copy, copy);
  }
}

// A row's sums. Halves become floats first.
template <class Processor, bool standardized, class Grad, class Later>
INLINE void add_row(const float* p, const Grad* g, int64_t n, const Later& later, PairSums& sums) {
  in_chunks(n, later, [&](int64_t begin, int64_t end) INLINE_BODY {
    if constexpr (std::is_same_v<Grad, float>) {
      add<Processor, standardized>(p + begin, g + begin, end - begin, sums);
    } else {
      float grads[kChunk];
      any_order(begin, end, [&](int64_t i) INLINE_BODY { grads[i - begin] = g[i]; });
      add<Processor, standardized>(p + begin, grads, end - begin, sums);
    }
  });
}

template <class Processor, class Grad, class Rule>
INLINE void update_units(const Step<Rule>& step, const Arrays<Rule>* arrays, double unscale, int64_t begin,
                         int64_t end) {
  constexpr int kStates = Rule::kStates;
  Copy last;
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit = step.units[u];
    const Arrays<Rule>& tensor = arrays[unit.tensor];
    const typename Rule::Hyper hyper = step.hyper[unit.group];
    const typename Rule::Rate rate = step.rate[unit.group * step.rate_stride];
    const int64_t n = unit.length;
    float* __restrict__ p = tensor.param + unit.offset;
    const Grad* __restrict__ g = static_cast<const Grad*>(tensor.grad) + unit.offset;
    float* state[kStates];
    Ahead<float> states_ahead[kStates];
    for (int k = 0; k < kStates; ++k) {
      state[k] = tensor.state[k] + unit.offset;
      states_ahead[k] = Ahead<float>(state[k], n);
    }
    const auto own = [&](int64_t i) INLINE_BODY {
      for (const Ahead<float>& ahead : states_ahead) ahead.fetch(i);
    };
    Ahead<float> next_p;
    Ahead<Grad> next_g;
    if (u + 1 < end) {
      const Unit after = step.units[u + 1];
      next_p = Ahead<float>(arrays[after.tensor].param + after.offset, after.length);
      next_g = Ahead<Grad>(static_cast<const Grad*>(arrays[after.tensor].grad) + after.offset, after.length);
    }
    const auto next = [&](int64_t i) INLINE_BODY {
      next_p.fetch(i);
      next_g.fetch(i);
    };
    const auto element = [&](int64_t i, const auto& transform) INLINE_BODY {
      float values[kStates];
      for (int k = 0; k < kStates; ++k) values[k] = state[k][i];
      update<Rule>(p[i], values, static_cast<float>(g[i]), transform, hyper, rate);
      for (int k = 0; k < kStates; ++k) state[k][i] = values[k];
    };

    const bool standardized = hyper.standardize_eps >= 0.0f;
    Transform t{0.0f, 0.0f, 0.0f, {static_cast<float>(unscale), 1.0f, false}};
    PairSums sums;
    if (standardized) {
      add_row<Processor, true>(p, g, n, own, sums);
      t = transform_of(sums.totals(), 1.0 / n, unscale, hyper);
    } else if (hyper.clipping >= 0.0f) {
      add_row<Processor, false>(p, g, n, own, sums);
      t.factors = clip_factors(sums.pp.total(), sums.gg.total(), unscale, hyper);
    }
    if (step.clipped && t.factors.clipped) ++step.clipped[u];

    // Here, one row late: the processor writes it while it waits for the roots and divisions of both rows.
    write(step.copy, last);
    last = copy_of(step, tensor, unit, hyper);

    if (!standardized) {
      in_any_order(n, next, [&](int64_t i) INLINE_BODY { element(i, t.factors); });
    } else if (!tensor.copy) {
      in_any_order(n, next, [&](int64_t i) INLINE_BODY { element(i, t); });
    } else {
      // Apart: in one loop with an update, which has a condition, sums do not stay in registers.
      Moments moments;
      in_chunks(n, next, [&](int64_t begin, int64_t end) INLINE_BODY {
        any_order(begin, end, [&](int64_t i) INLINE_BODY { element(i, t); });
        add<Processor>(p + begin, end - begin, moments);
      });
      standardize(moments, hyper, last);
    }
  }
  write(step.copy, last);
}

// A thread takes the next part when it is done with one: short rows take longer than long ones of as many elements, and
// another program may take a core for a while.
constexpr int kPartsOfAThread = 16;

// First unit of each of `parts` runs of about equally many elements; `parts + 1` entries.
inline std::vector<int64_t> split_by_elements(const Unit* units, int64_t count, int parts) {
  int64_t total = 0;
  for (int64_t u = 0; u < count; ++u) total += units[u].length;
  std::vector<int64_t> starts(parts + 1, count);
  int64_t seen = 0;
  int part = 0;
  for (int64_t u = 0; u < count; ++u) {
    while (part < parts && seen >= total * part / parts) starts[part++] = u;
    seen += units[u].length;
  }
  return starts;
}

// The units from `begin` to `end`.
template <class Rule>
void step_part(const Step<Rule>& step, const Arrays<Rule>* arrays, double unscale, int64_t begin, int64_t end) {
  const auto update = [&](auto grad) {
    on_this_processor([&](auto processor) INLINE_BODY {
      update_units<decltype(processor), decltype(grad)>(step, arrays, unscale, begin, end);
    });
  };
  switch (step.grad) {
    case Dtype::f16: return update(c10::Half());
    case Dtype::bf16: return update(c10::BFloat16());
    case Dtype::f32: return update(float());
    default: on_this_processor([&](auto processor) INLINE_BODY {
      copy_only<decltype(processor)>(step, arrays, begin, end);
    });
  }
}

template <class Rule>
void step_cpu(const Step<Rule>& step, const Arrays<Rule>* arrays) {
  if (step.found_inf && *step.found_inf != 0.0f) return;
  const double unscale = step.grad_scale ? 1.0 / static_cast<double>(*step.grad_scale) : 1.0;
  const int threads = at::get_num_threads(), parts = threads > 1 ? threads * kPartsOfAThread : 1;
  const std::vector<int64_t> starts = split_by_elements(step.units, step.count, parts);
  std::atomic<int> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int part; (part = next++) < parts;) step_part(step, arrays, unscale, starts[part], starts[part + 1]);
    end_of_copies();
  });
  if (step.clipped) ++step.clipped[step.count];
}

}  // namespace
}  // namespace boosterbit
