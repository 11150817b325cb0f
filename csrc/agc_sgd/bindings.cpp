// The operators of AGC-SGD: schemas, checks, dispatch.
#include <torch/library.h>

#ifdef BOOSTERBIT_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <optional>
#include <vector>

#include "../families.h"
#include "api.h"
#include "rows.h"

namespace boosterbit {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default:
      TORCH_CHECK(false, "agc_sgd_: ", name, " is ", tensor.scalar_type(), "; float32, float16 or bfloat16 expected");
  }
}

// One tensor of the step, as it is handed in.
struct Operand {
  const Tensor& param;
  const Tensor* grad;  // null, as momentum, where only the copy is written
  const Tensor* momentum;
  const Tensor* copy;
};

// Whether two dense tensors of one shape lie in memory alike. The stride of a dimension of size 1 means nothing.
bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

void check_operand(const Operand& x, int64_t index) {
  TORCH_CHECK(x.param.scalar_type() == at::kFloat, "agc_sgd_: parameter ", index, " is ", x.param.scalar_type(),
              "; float32 expected");
  TORCH_CHECK(!x.momentum || x.momentum->scalar_type() == at::kFloat, "agc_sgd_: momentum ", index, " is ",
              x.momentum->scalar_type(), "; float32 expected");
  TORCH_CHECK(x.param.is_non_overlapping_and_dense(), "agc_sgd_: parameter ", index, " of shape ", x.param.sizes(),
              " and strides ", x.param.strides(), " is not dense in memory");
  const auto same = [&](const Tensor* tensor, const char* name) {
    if (!tensor) return;
    const Tensor& other = *tensor;
    TORCH_CHECK(other.device() == x.param.device(), "agc_sgd_: ", name, " ", index, " is on ", other.device(),
                ", its parameter on ", x.param.device());
    TORCH_CHECK(other.sizes() == x.param.sizes() && (x.param.numel() == 0 || same_layout(other, x.param)),
                "agc_sgd_: ", name, " ", index, " has shape ", other.sizes(), " and strides ", other.strides(),
                ", its parameter ", x.param.sizes(), " and ", x.param.strides());
  };
  same(x.grad, "gradient");
  same(x.momentum, "momentum");
  same(x.copy, "copy");
}

void check_tables(const Tensor& first, const Tensor& units, at::IntArrayRef classes, const OptionalTensor& lr,
                  const Tensor& hyper, const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
  const auto here = [&](const Tensor& table, const char* name, at::ScalarType dtype) {
    TORCH_CHECK(table.device() == first.device(), "agc_sgd_: ", name, " is on ", table.device(), ", the parameters on ",
                first.device());
    TORCH_CHECK(table.scalar_type() == dtype && table.is_contiguous(), "agc_sgd_: ", name, " must be contiguous ",
                dtype, ", found ", table.scalar_type());
  };
  here(units, "units", at::kLong);
  if (lr.has_value()) here(*lr, "lr", at::kFloat);
  here(hyper, "hyper", at::kFloat);
  TORCH_CHECK(units.dim() == 2 && units.size(1) == kUnitColumns, "agc_sgd_: units has shape ", units.sizes(),
              "; (units, ", kUnitColumns, ") expected");
  TORCH_CHECK(hyper.dim() == 2 && hyper.size(1) == kHyperColumns && hyper.size(0) > 0, "agc_sgd_: hyper has shape ",
              hyper.sizes(), "; (groups, ", kHyperColumns, ") expected");
  TORCH_CHECK(!lr.has_value() || lr->numel() == 1 || lr->numel() == hyper.size(0), "agc_sgd_: lr has ", lr->numel(),
              " values; 1 or ", hyper.size(0), " (one per group) expected");
  int64_t total = 0;
  for (const int64_t count : classes) total += count;
  TORCH_CHECK(classes.empty() || total == units.size(0), "agc_sgd_: classes count ", total, " units, the table has ",
              units.size(0));
  for (const auto& [flag, name] : {std::pair{&grad_scale, "grad_scale"}, std::pair{&found_inf, "found_inf"}}) {
    if (!flag->has_value()) continue;
    here(**flag, name, at::kFloat);
    TORCH_CHECK((*flag)->numel() == 1, "agc_sgd_: ", name, " has ", (*flag)->numel(), " values; 1 expected");
  }
}

// The CPU can afford to look at every row of the table; a table on a GPU is trusted (engine.optim.ops.unit_table checks).
void check_units(const Tensor& units, const std::vector<Operand>& operands, int64_t groups) {
  const auto* unit = reinterpret_cast<const Unit*>(units.const_data_ptr<int64_t>());
  const auto tensors = static_cast<int64_t>(operands.size());
  for (int64_t u = 0; u < units.size(0); ++u, ++unit) {
    TORCH_CHECK(
        unit->tensor >= 0 && unit->tensor < tensors && unit->group >= 0 && unit->group < groups && unit->length > 0 &&
            unit->offset >= 0 && unit->length <= operands[unit->tensor].param.numel() - unit->offset,
        "agc_sgd_: unit ", u, " (offset ", unit->offset, ", length ", unit->length, ", group ", unit->group,
        ", tensor ", unit->tensor, ") lies outside the ", tensors, " tensors and ", groups, " groups of this call");
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

Call prepare(const std::vector<Operand>& operands, const Tensor& units, at::IntArrayRef classes,
             const OptionalTensor& lr, const Tensor& hyper, const OptionalTensor& grad_scale,
             const OptionalTensor& found_inf) {
  const Operand& first = operands.front();
  for (size_t i = 0; i < operands.size(); ++i) {
    const Operand& x = operands[i];
    check_operand(x, static_cast<int64_t>(i));
    TORCH_CHECK(x.param.device() == first.param.device(), "agc_sgd_: parameters lie on ", first.param.device(), " and ",
                x.param.device());
    TORCH_CHECK(!x.grad || x.grad->scalar_type() == first.grad->scalar_type(), "agc_sgd_: gradients are ",
                first.grad->scalar_type(), " and ", x.grad->scalar_type());
    TORCH_CHECK(!x.copy || x.copy->scalar_type() == first.copy->scalar_type(), "agc_sgd_: the copies differ in dtype");
  }
  check_tables(first.param, units, classes, lr, hyper, grad_scale, found_inf);

  Call call{};
  call.step = Step{
      reinterpret_cast<const Unit*>(units.const_data_ptr<int64_t>()),
      units.size(0),
      pointer<float>(lr),
      lr.has_value() && lr->numel() > 1 ? 1 : 0,
      reinterpret_cast<const Hyper*>(hyper.const_data_ptr<float>()),
      pointer<float>(grad_scale),
      pointer<float>(found_inf),
      first.grad ? dtype_of(*first.grad, "gradient") : Dtype::none,
      first.copy ? dtype_of(*first.copy, "copy") : Dtype::none,
  };
  for (const Operand& x : operands) {
    const bool updates = x.grad != nullptr;
    // A call that only writes copies does not touch the parameters.
    float* param = updates ? x.param.mutable_data_ptr<float>() : const_cast<float*>(x.param.const_data_ptr<float>());
    call.arrays.push_back({param, updates ? x.grad->const_data_ptr() : nullptr,
                           updates ? x.momentum->mutable_data_ptr<float>() : nullptr,
                           x.copy ? x.copy->mutable_data_ptr() : nullptr});
    if (updates) bump(x.param);
    if (updates) bump(*x.momentum);
    if (x.copy) bump(*x.copy);
  }
  return call;
}

std::vector<Operand> operands_of(at::TensorList params, at::TensorList grads, at::TensorList momenta,
                                 at::TensorList copies) {
  TORCH_CHECK(grads.size() == params.size() && momenta.size() == params.size() &&
                  (copies.empty() || copies.size() == params.size()),
              "agc_sgd_list_: ", params.size(), " parameters, ", grads.size(), " gradients, ", momenta.size(),
              " momenta, ", copies.size(), " copies");
  std::vector<Operand> operands;
  for (size_t i = 0; i < params.size(); ++i)
    operands.push_back({params[i], &grads[i], &momenta[i], copies.empty() ? nullptr : &copies[i]});
  return operands;
}

void run_cpu(const std::vector<Operand>& operands, const Tensor& units, at::IntArrayRef classes,
             const OptionalTensor& lr, const Tensor& hyper, const OptionalTensor& grad_scale,
             const OptionalTensor& found_inf) {
  if (operands.empty()) return;
  const Call call = prepare(operands, units, classes, lr, hyper, grad_scale, found_inf);
  check_units(units, operands, hyper.size(0));
  agc_sgd_cpu(call.step, call.arrays.data());
}

#ifdef BOOSTERBIT_CUDA
void run_cuda(const std::vector<Operand>& operands, const Tensor& units, at::IntArrayRef classes,
              const OptionalTensor& lr, const Tensor& hyper, const OptionalTensor& grad_scale,
              const OptionalTensor& found_inf) {
  if (operands.empty()) return;
  const c10::cuda::CUDAGuard guard(operands.front().param.device());
  const Call call = prepare(operands, units, classes, lr, hyper, grad_scale, found_inf);
  TORCH_CHECK(classes.size() == kClasses, "agc_sgd_: the GPU needs units sorted by size class (sort_units_) and ",
              kClasses, " counts, found ", classes.size());
  TORCH_CHECK(operands.size() <= kMaxTensors, "agc_sgd_list_: ", operands.size(), " tensors in a call, at most ",
              kMaxTensors, " expected");
  ClassCounts counts;
  std::copy(classes.begin(), classes.end(), counts.count);
  const char* error = agc_sgd_cuda(call.step, call.arrays.data(), static_cast<int>(operands.size()), counts,
                                   c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(error == nullptr, "agc_sgd_: the kernel was not launched: ", error);
}
#endif

using Run = void (*)(const std::vector<Operand>&, const Tensor&, at::IntArrayRef, const OptionalTensor&, const Tensor&,
                     const OptionalTensor&, const OptionalTensor&);

template <Run run>
void agc_sgd(const Tensor& param, const Tensor& grad, const Tensor& momentum, const Tensor& units,
             at::IntArrayRef classes, const Tensor& lr, const Tensor& hyper, const OptionalTensor& grad_scale,
             const OptionalTensor& found_inf, const OptionalTensor& copy) {
  run({{param, &grad, &momentum, copy.has_value() ? &*copy : nullptr}}, units, classes, lr, hyper, grad_scale,
      found_inf);
}

template <Run run>
void agc_sgd_list(at::TensorList params, at::TensorList grads, at::TensorList momenta, const Tensor& units,
                  at::IntArrayRef classes, const Tensor& lr, const Tensor& hyper, const OptionalTensor& grad_scale,
                  const OptionalTensor& found_inf, at::TensorList copies) {
  run(operands_of(params, grads, momenta, copies), units, classes, lr, hyper, grad_scale, found_inf);
}

template <Run run>
void write_copy(const Tensor& param, const Tensor& copy, const Tensor& units, at::IntArrayRef classes,
                const Tensor& hyper) {
  run({{param, nullptr, nullptr, &copy}}, units, classes, std::nullopt, hyper, std::nullopt, std::nullopt);
}

// Nothing to compute and nothing to return: tracing sees the mutation in the schema.
void run_meta(const std::vector<Operand>&, const Tensor&, at::IntArrayRef, const OptionalTensor&, const Tensor&,
              const OptionalTensor&, const OptionalTensor&) {}

std::vector<int64_t> sort_units(const Tensor& units) {
  TORCH_CHECK(
      units.scalar_type() == at::kLong && units.is_contiguous() && units.dim() == 2 && units.size(1) == kUnitColumns,
      "sort_units_: contiguous int64 of shape (units, ", kUnitColumns, ") expected, found ", units.scalar_type(),
      " of shape ", units.sizes());
  std::vector<int64_t> counts(kClasses, 0);
  auto* first = reinterpret_cast<Unit*>(units.mutable_data_ptr<int64_t>());
  auto* last = first + units.size(0);
  for (const Unit* unit = first; unit != last; ++unit) ++counts[size_class(unit->length)];
  // Classes follow lengths. The longest first within a class too: what is left at the end is small.
  std::stable_sort(first, last, [](const Unit& a, const Unit& b) { return a.length > b.length; });
  bump(units);
  return counts;
}

template <Run run>
void implement(torch::Library& m) {
  m.impl("agc_sgd_", &agc_sgd<run>);
  m.impl("agc_sgd_list_", &agc_sgd_list<run>);
  m.impl("write_copy_", &write_copy<run>);
}

void schemas(torch::Library& m) {
  m.def(
      "agc_sgd_(Tensor(a!) param, Tensor grad, Tensor(b!) momentum, Tensor units, int[] classes, Tensor lr, Tensor "
      "hyper, *, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(c!)? copy=None) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "agc_sgd_list_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor units, int[] classes, Tensor "
      "lr, Tensor hyper, *, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(c!)[] copies) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def("write_copy_(Tensor param, Tensor(a!) copy, Tensor units, int[] classes, Tensor hyper) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def("sort_units_(Tensor(a!) units) -> int[]");
}

void cpu(torch::Library& m) {
  implement<run_cpu>(m);
  m.impl("sort_units_", &sort_units);
}

}  // namespace

// Constant-initialized, so that it is there whenever the registering file's statics run.
#ifdef BOOSTERBIT_CUDA
const Family agc_sgd_family = {&schemas, &cpu, &implement<run_cuda>, &implement<run_meta>};
#else
const Family agc_sgd_family = {&schemas, &cpu, nullptr, &implement<run_meta>};
#endif

}  // namespace boosterbit
