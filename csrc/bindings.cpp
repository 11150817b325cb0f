// The operators of the `boosterbit` torch library: schemas, checks, dispatch.
#include <Python.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <vector>

#include "agc_sgd.h"

namespace boosterbit {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default: TORCH_CHECK(false, "agc_sgd_: ", name, " is ", tensor.scalar_type(), "; float32, float16 or bfloat16 expected");
  }
}

// One tensor of the step, as it is handed in.
struct Operand {
  const Tensor& param;
  const Tensor& grad;
  const Tensor& momentum;
  const Tensor* copy;
};

void check_operand(const Operand& x, int64_t index) {
  TORCH_CHECK(x.param.scalar_type() == at::kFloat, "agc_sgd_: parameter ", index, " is ", x.param.scalar_type(), "; float32 expected");
  TORCH_CHECK(x.momentum.scalar_type() == at::kFloat, "agc_sgd_: momentum ", index, " is ", x.momentum.scalar_type(), "; float32 expected");
  TORCH_CHECK(x.param.is_non_overlapping_and_dense(), "agc_sgd_: parameter ", index, " of shape ", x.param.sizes(), " and strides ",
              x.param.strides(), " is not dense in memory");
  const auto same = [&](const Tensor& other, const char* name) {
    TORCH_CHECK(other.device() == x.param.device(), "agc_sgd_: ", name, " ", index, " is on ", other.device(), ", its parameter on ", x.param.device());
    TORCH_CHECK(other.sizes() == x.param.sizes() && other.strides() == x.param.strides(), "agc_sgd_: ", name, " ", index, " has shape ",
                other.sizes(), " and strides ", other.strides(), ", its parameter ", x.param.sizes(), " and ", x.param.strides());
  };
  same(x.grad, "gradient");
  same(x.momentum, "momentum");
  if (x.copy) same(*x.copy, "copy");
}

void check_tables(const Tensor& first, const Tensor& units, at::IntArrayRef classes, const Tensor& lr, const Tensor& hyper,
                  const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
  const auto here = [&](const Tensor& table, const char* name, at::ScalarType dtype) {
    TORCH_CHECK(table.device() == first.device(), "agc_sgd_: ", name, " is on ", table.device(), ", the parameters on ", first.device());
    TORCH_CHECK(table.scalar_type() == dtype && table.is_contiguous(), "agc_sgd_: ", name, " must be contiguous ", dtype, ", found ", table.scalar_type());
  };
  here(units, "units", at::kLong);
  here(lr, "lr", at::kFloat);
  here(hyper, "hyper", at::kFloat);
  TORCH_CHECK(units.dim() == 2 && units.size(1) == kUnitColumns, "agc_sgd_: units has shape ", units.sizes(), "; (units, ", kUnitColumns, ") expected");
  TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == kHyperColumns && hyper.size(0) > 0, "agc_sgd_: hyper has shape ", hyper.sizes(),
              "; (groups, ", kHyperColumns, ") expected");
  TORCH_CHECK(lr.numel() == 1 || lr.numel() == hyper.size(0), "agc_sgd_: lr has ", lr.numel(), " values; 1 or ", hyper.size(0), " (one per group) expected");
  int64_t total = 0;
  for (const int64_t count : classes) total += count;
  TORCH_CHECK(classes.empty() || total == units.size(0), "agc_sgd_: classes count ", total, " units, the table has ", units.size(0));
  for (const auto& [flag, name] : {std::pair{&grad_scale, "grad_scale"}, std::pair{&found_inf, "found_inf"}}) {
    if (!flag->has_value()) continue;
    here(**flag, name, at::kFloat);
    TORCH_CHECK((*flag)->numel() == 1, "agc_sgd_: ", name, " has ", (*flag)->numel(), " values; 1 expected");
  }
}

// The CPU can afford to look at every row of the table; a table on a GPU is trusted (engine.ops.unit_table checks).
void check_units(const Tensor& units, const std::vector<Operand>& operands, int64_t groups) {
  const auto* unit = reinterpret_cast<const Unit*>(units.const_data_ptr<int64_t>());
  const auto tensors = static_cast<int64_t>(operands.size());
  for (int64_t u = 0; u < units.size(0); ++u, ++unit) {
    TORCH_CHECK(unit->tensor >= 0 && unit->tensor < tensors && unit->group >= 0 && unit->group < groups && unit->length > 0 &&
                    unit->offset >= 0 && unit->length <= operands[unit->tensor].param.numel() - unit->offset,
                "agc_sgd_: unit ", u, " (offset ", unit->offset, ", length ", unit->length, ", group ", unit->group, ", tensor ", unit->tensor,
                ") lies outside the ", tensors, " tensors and ", groups, " groups of this call");
  }
}

template <class T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

// Autograd must notice that these tensors changed, as after any in-place operation.
void bump(const Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

struct Call {
  Step step;
  std::vector<Arrays> arrays;
};

Call prepare(const std::vector<Operand>& operands, const Tensor& units, at::IntArrayRef classes, const Tensor& lr, const Tensor& hyper,
             const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
  const Operand& first = operands.front();
  for (size_t i = 0; i < operands.size(); ++i) {
    const Operand& x = operands[i];
    check_operand(x, static_cast<int64_t>(i));
    TORCH_CHECK(x.param.device() == first.param.device(), "agc_sgd_: parameters lie on ", first.param.device(), " and ", x.param.device());
    TORCH_CHECK(x.grad.scalar_type() == first.grad.scalar_type(), "agc_sgd_: gradients are ", first.grad.scalar_type(), " and ", x.grad.scalar_type());
    TORCH_CHECK(!x.copy || x.copy->scalar_type() == first.copy->scalar_type(), "agc_sgd_: the copies differ in dtype");
  }
  check_tables(first.param, units, classes, lr, hyper, grad_scale, found_inf);

  Call call{};
  call.step = Step{
      reinterpret_cast<const Unit*>(units.const_data_ptr<int64_t>()),
      units.size(0),
      lr.const_data_ptr<float>(),
      lr.numel() == 1 ? 0 : 1,
      reinterpret_cast<const Hyper*>(hyper.const_data_ptr<float>()),
      pointer<float>(grad_scale),
      pointer<float>(found_inf),
      dtype_of(first.grad, "gradient"),
      first.copy ? dtype_of(*first.copy, "copy") : Dtype::none,
  };
  for (const Operand& x : operands) {
    call.arrays.push_back({x.param.mutable_data_ptr<float>(), x.grad.const_data_ptr(), x.momentum.mutable_data_ptr<float>(),
                           x.copy ? x.copy->mutable_data_ptr() : nullptr});
    bump(x.param);
    bump(x.momentum);
    if (x.copy) bump(*x.copy);
  }
  return call;
}

std::vector<Operand> operands_of(at::TensorList params, at::TensorList grads, at::TensorList momenta, at::TensorList copies) {
  TORCH_CHECK(grads.size() == params.size() && momenta.size() == params.size() && (copies.empty() || copies.size() == params.size()),
              "agc_sgd_list_: ", params.size(), " parameters, ", grads.size(), " gradients, ", momenta.size(), " momenta, ", copies.size(), " copies");
  std::vector<Operand> operands;
  for (size_t i = 0; i < params.size(); ++i) operands.push_back({params[i], grads[i], momenta[i], copies.empty() ? nullptr : &copies[i]});
  return operands;
}

void run_cpu(const std::vector<Operand>& operands, const Tensor& units, at::IntArrayRef classes, const Tensor& lr, const Tensor& hyper,
             const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
  if (operands.empty()) return;
  const Call call = prepare(operands, units, classes, lr, hyper, grad_scale, found_inf);
  check_units(units, operands, hyper.size(0));
  agc_sgd_cpu(call.step, call.arrays.data());
}

using Run = void (*)(const std::vector<Operand>&, const Tensor&, at::IntArrayRef, const Tensor&, const Tensor&, const OptionalTensor&,
                     const OptionalTensor&);

template <Run run>
void agc_sgd(const Tensor& param, const Tensor& grad, const Tensor& momentum, const Tensor& units, at::IntArrayRef classes, const Tensor& lr,
             const Tensor& hyper, const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalTensor& copy) {
  run({{param, grad, momentum, copy.has_value() ? &*copy : nullptr}}, units, classes, lr, hyper, grad_scale, found_inf);
}

template <Run run>
void agc_sgd_list(at::TensorList params, at::TensorList grads, at::TensorList momenta, const Tensor& units, at::IntArrayRef classes, const Tensor& lr,
                  const Tensor& hyper, const OptionalTensor& grad_scale, const OptionalTensor& found_inf, at::TensorList copies) {
  run(operands_of(params, grads, momenta, copies), units, classes, lr, hyper, grad_scale, found_inf);
}

// Nothing to compute and nothing to return: tracing sees the mutation in the schema.
void run_meta(const std::vector<Operand>&, const Tensor&, at::IntArrayRef, const Tensor&, const Tensor&, const OptionalTensor&,
              const OptionalTensor&) {}

}  // namespace

TORCH_LIBRARY(boosterbit, m) {
  m.def(
      "agc_sgd_(Tensor(a!) param, Tensor grad, Tensor(b!) momentum, Tensor units, int[] classes, Tensor lr, Tensor hyper, *, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(c!)? copy=None) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "agc_sgd_list_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor units, int[] classes, Tensor lr, Tensor hyper, *, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(c!)[] copies) -> ()",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(boosterbit, CPU, m) {
  m.impl("agc_sgd_", &agc_sgd<run_cpu>);
  m.impl("agc_sgd_list_", &agc_sgd_list<run_cpu>);
}

TORCH_LIBRARY_IMPL(boosterbit, Meta, m) {
  m.impl("agc_sgd_", &agc_sgd<run_meta>);
  m.impl("agc_sgd_list_", &agc_sgd_list<run_meta>);
}

}  // namespace boosterbit

// `import engine._C` loads the library; everything else is reached through torch.ops.boosterbit.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The compiled operators of BoosterBiT.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
