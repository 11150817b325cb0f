// What an operator is called with, checked, and as kernels take it; for any rule.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "rows.h"
#include "step.h"

namespace boosterbit {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What of an operator stands in its messages.
struct Names {
  const char* op;
  const char* const* states;
};

// One tensor of the step, as it is handed in.
struct Operand {
  const Tensor& param;
  const Tensor* grad;  // null, and no states, where only the copy is written
  c10::SmallVector<const Tensor*, 3> states;
  const Tensor* copy;
};
using Operands = std::vector<Operand>;

// The tables of a step, and what it reads beside them.
struct Tables {
  const Tensor& units;
  at::IntArrayRef classes;
  const OptionalTensor& lr;
  const Tensor& hyper;
  int64_t hyper_columns;
  const OptionalTensor& grad_scale;
  const OptionalTensor& found_inf;
  const OptionalTensor& clipped;
};

// Operands of lists; `states` has a list for each state.
Operands operands_of(const Names& names, at::TensorList params, at::TensorList grads,
                     const std::vector<at::TensorList>& states, at::TensorList copies);

// Throws where the operands or tables do not fit each other.
void check(const Names& names, const Operands& operands, const Tables& tables);

// The CPU can afford to look at every row of the table; a table on a GPU is trusted (engine.optim.ops.unit_table checks).
void check_units(const Names& names, const Tensor& units, const Operands& operands, int64_t groups);

// Throws where a GPU cannot take these in one launch; else the counts.
ClassCounts check_launch(const Names& names, const Operands& operands, at::IntArrayRef classes, int max_tensors);

// A number or flag on the operands' device.
void check_here(const Names& names, const Tensor& first, const Tensor& table, const char* name, at::ScalarType dtype);

Dtype dtype_of(const Names& names, const Tensor& tensor, const char* name);

// Autograd must notice that this tensor changed, as after any in-place operation.
void bump(const Tensor& tensor);

template <class T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

template <class Rule>
constexpr Names kNames{Rule::kName, Rule::kStateNames};

template <class Rule>
struct Call {
  Step<Rule> step;  // without a rate
  std::vector<Arrays<Rule>> arrays;
};

// `operands` are not empty.
template <class Rule>
Call<Rule> prepare(const Operands& operands, const Tables& tables) {
  const Names& names = kNames<Rule>;
  check(names, operands, tables);
  const Operand& first = operands.front();
  Call<Rule> call{};
  call.step = Step<Rule>{
      reinterpret_cast<const Unit*>(tables.units.const_data_ptr<int64_t>()),
      tables.units.size(0),
      nullptr,
      0,
      reinterpret_cast<const typename Rule::Hyper*>(tables.hyper.const_data_ptr<float>()),
      pointer<float>(tables.grad_scale),
      pointer<float>(tables.found_inf),
      first.grad ? dtype_of(names, *first.grad, "gradient") : Dtype::none,
      first.copy ? dtype_of(names, *first.copy, "copy") : Dtype::none,
      tables.clipped.has_value() ? tables.clipped->mutable_data_ptr<int32_t>() : nullptr,
  };
  for (const Operand& x : operands) {
    const bool updates = x.grad != nullptr;
    // A call that only writes copies does not touch the parameters.
    Arrays<Rule> arrays{
        updates ? x.param.mutable_data_ptr<float>() : const_cast<float*>(x.param.const_data_ptr<float>()),
        updates ? x.grad->const_data_ptr() : nullptr,
        {},
        x.copy ? x.copy->mutable_data_ptr() : nullptr};
    for (size_t k = 0; k < x.states.size(); ++k) {
      arrays.state[k] = x.states[k]->mutable_data_ptr<float>();
      bump(*x.states[k]);
    }
    if (updates) bump(x.param);
    if (x.copy) bump(*x.copy);
    call.arrays.push_back(arrays);
  }
  if (tables.clipped.has_value()) bump(*tables.clipped);
  return call;
}

}  // namespace boosterbit
