#include "call.h"

#include <algorithm>
#include <utility>

namespace boosterbit {
namespace {

// Whether two dense tensors of one shape lie in memory alike. The stride of a dimension of size 1 means nothing.
bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

void check_operand(const Names& names, const Operand& x, int64_t index) {
  TORCH_CHECK(x.param.scalar_type() == at::kFloat, names.op, ": parameter ", index, " is ", x.param.scalar_type(),
              "; float32 expected");
  TORCH_CHECK(x.param.is_non_overlapping_and_dense(), names.op, ": parameter ", index, " of shape ", x.param.sizes(),
              " and strides ", x.param.strides(), " is not dense in memory");
  const auto same = [&](const Tensor* tensor, const char* name) {
    if (!tensor) return;
    const Tensor& other = *tensor;
    TORCH_CHECK(other.device() == x.param.device(), names.op, ": ", name, " ", index, " is on ", other.device(),
                ", its parameter on ", x.param.device());
    TORCH_CHECK(other.sizes() == x.param.sizes() && (x.param.numel() == 0 || same_layout(other, x.param)), names.op,
                ": ", name, " ", index, " has shape ", other.sizes(), " and strides ", other.strides(),
                ", its parameter ", x.param.sizes(), " and ", x.param.strides());
  };
  same(x.grad, "gradient");
  for (size_t k = 0; k < x.states.size(); ++k) {
    TORCH_CHECK(x.states[k]->scalar_type() == at::kFloat, names.op, ": ", names.states[k], " ", index, " is ",
                x.states[k]->scalar_type(), "; float32 expected");
    same(x.states[k], names.states[k]);
  }
  same(x.copy, "copy");
}

void check_tables(const Names& names, const Tensor& first, const Tables& x) {
  check_here(names, first, x.units, "units", at::kLong);
  if (x.lr.has_value()) check_here(names, first, *x.lr, "lr", at::kFloat);
  check_here(names, first, x.hyper, "hyper", at::kFloat);
  TORCH_CHECK(x.units.dim() == 2 && x.units.size(1) == kUnitColumns, names.op, ": units has shape ", x.units.sizes(),
              "; (units, ", kUnitColumns, ") expected");
  TORCH_CHECK(x.hyper.dim() == 2 && x.hyper.size(1) == x.hyper_columns && x.hyper.size(0) > 0, names.op,
              ": hyper has shape ", x.hyper.sizes(), "; (groups, ", x.hyper_columns, ") expected");
  TORCH_CHECK(!x.lr.has_value() || x.lr->numel() == 1 || x.lr->numel() == x.hyper.size(0), names.op, ": lr has ",
              x.lr->numel(), " values; 1 or ", x.hyper.size(0), " (one per group) expected");
  int64_t total = 0;
  for (const int64_t count : x.classes) total += count;
  TORCH_CHECK(x.classes.empty() || total == x.units.size(0), names.op, ": classes count ", total,
              " units, the table has ", x.units.size(0));
  for (const auto& [flag, name] : {std::pair{&x.grad_scale, "grad_scale"}, std::pair{&x.found_inf, "found_inf"}}) {
    if (!flag->has_value()) continue;
    check_here(names, first, **flag, name, at::kFloat);
    TORCH_CHECK((*flag)->numel() == 1, names.op, ": ", name, " has ", (*flag)->numel(), " values; 1 expected");
  }
  if (!x.clipped.has_value()) return;
  check_here(names, first, *x.clipped, "clipped", at::kInt);
  TORCH_CHECK(x.clipped->numel() == x.units.size(0) + 1, names.op, ": clipped has ", x.clipped->numel(),
              " counters; ", x.units.size(0), " for the units and one for the steps expected");
}

}  // namespace

void check_here(const Names& names, const Tensor& first, const Tensor& table, const char* name, at::ScalarType dtype) {
  TORCH_CHECK(table.device() == first.device(), names.op, ": ", name, " is on ", table.device(), ", the parameters on ",
              first.device());
  TORCH_CHECK(table.scalar_type() == dtype && table.is_contiguous(), names.op, ": ", name, " must be contiguous ", dtype,
              ", found ", table.scalar_type());
}

Dtype dtype_of(const Names& names, const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default:
      TORCH_CHECK(false, names.op, ": ", name, " is ", tensor.scalar_type(), "; float32, float16 or bfloat16 expected");
  }
}

void bump(const Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

Operands operands_of(const Names& names, at::TensorList params, at::TensorList grads,
                     const std::vector<at::TensorList>& states, at::TensorList copies) {
  TORCH_CHECK(grads.size() == params.size(), names.op, ": ", params.size(), " parameters, ", grads.size(), " gradients");
  for (size_t k = 0; k < states.size(); ++k) {
    TORCH_CHECK(states[k].size() == params.size(), names.op, ": ", params.size(), " parameters, ", states[k].size(), " ",
                names.states[k]);
  }
  TORCH_CHECK(copies.empty() || copies.size() == params.size(), names.op, ": ", params.size(), " parameters, ",
              copies.size(), " copies");
  Operands operands;
  for (size_t i = 0; i < params.size(); ++i) {
    operands.push_back({params[i], &grads[i], {}, copies.empty() ? nullptr : &copies[i]});
    for (const at::TensorList& list : states) operands.back().states.push_back(&list[i]);
  }
  return operands;
}

void check(const Names& names, const Operands& operands, const Tables& tables) {
  const Operand& first = operands.front();
  for (size_t i = 0; i < operands.size(); ++i) {
    const Operand& x = operands[i];
    check_operand(names, x, static_cast<int64_t>(i));
    TORCH_CHECK(x.param.device() == first.param.device(), names.op, ": parameters lie on ", first.param.device(),
                " and ", x.param.device());
    TORCH_CHECK(!x.grad || x.grad->scalar_type() == first.grad->scalar_type(), names.op, ": gradients are ",
                first.grad->scalar_type(), " and ", x.grad->scalar_type());
    TORCH_CHECK(!x.copy || x.copy->scalar_type() == first.copy->scalar_type(), names.op, ": the copies differ in dtype");
  }
  check_tables(names, first.param, tables);
}

void check_units(const Names& names, const Tensor& units, const Operands& operands, int64_t groups) {
  const auto* unit = reinterpret_cast<const Unit*>(units.const_data_ptr<int64_t>());
  const auto tensors = static_cast<int64_t>(operands.size());
  std::vector<int64_t> lengths;
  for (const Operand& x : operands) lengths.push_back(x.param.numel());
  for (int64_t u = 0; u < units.size(0); ++u, ++unit) {
    TORCH_CHECK(unit->tensor >= 0 && unit->tensor < tensors && unit->group >= 0 && unit->group < groups &&
                    unit->length > 0 && unit->offset >= 0 && unit->length <= lengths[unit->tensor] - unit->offset,
                names.op, ": unit ", u, " (offset ", unit->offset, ", length ", unit->length, ", group ", unit->group,
                ", tensor ", unit->tensor, ") lies outside the ", tensors, " tensors and ", groups,
                " groups of this call");
  }
}

ClassCounts check_launch(const Names& names, const Operands& operands, at::IntArrayRef classes, int max_tensors) {
  TORCH_CHECK(classes.size() == kClasses, names.op, ": the GPU needs units sorted by size class (sort_units_) and ",
              kClasses, " counts, found ", classes.size());
  TORCH_CHECK(operands.size() <= static_cast<size_t>(max_tensors), names.op, ": ", operands.size(),
              " tensors in a call, at most ", max_tensors, " expected");
  ClassCounts counts;
  std::copy(classes.begin(), classes.end(), counts.count);
  return counts;
}

}  // namespace boosterbit
