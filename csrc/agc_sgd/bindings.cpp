// The operators of AGC-SGD: schemas and dispatch.
#ifdef BOOSTERBIT_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>

#include "../agc/call.h"
#include "../families.h"
#include "rule.h"

namespace boosterbit {
namespace {

constexpr const Names& names = kNames<AgcSgd>;
constexpr int64_t kHyperColumns = sizeof(AgcSgd::Hyper) / sizeof(float);

Call<AgcSgd> prepared(const Operands& operands, const Tables& tables) {
  Call<AgcSgd> call = prepare<AgcSgd>(operands, tables);
  call.step.rate = pointer<float>(tables.lr);
  call.step.rate_stride = tables.lr.has_value() && tables.lr->numel() > 1 ? 1 : 0;
  return call;
}

void run_cpu(const Operands& operands, const Tables& tables) {
  if (operands.empty()) return;
  const Call<AgcSgd> call = prepared(operands, tables);
  check_units(names, tables.units, operands, tables.hyper.size(0));
  agc_sgd_cpu(call.step, call.arrays.data());
}

#ifdef BOOSTERBIT_CUDA
void run_cuda(const Operands& operands, const Tables& tables) {
  if (operands.empty()) return;
  const c10::cuda::CUDAGuard guard(operands.front().param.device());
  const Call<AgcSgd> call = prepared(operands, tables);
  const ClassCounts counts = check_launch(names, operands, tables.classes, AgcSgd::kMaxTensors);
  const char* error = agc_sgd_cuda(call.step, call.arrays.data(), static_cast<int>(operands.size()), counts,
                                   c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(error == nullptr, names.op, ": the kernel was not launched: ", error);
}
#endif

// Nothing to compute and nothing to return: tracing sees the mutation in the schema.
void run_meta(const Operands&, const Tables&) {}

using Run = void (*)(const Operands&, const Tables&);

template <Run run>
void agc_sgd(const Tensor& param, const Tensor& grad, const Tensor& momentum, const Tensor& units,
             at::IntArrayRef classes, const Tensor& lr, const Tensor& hyper, const OptionalTensor& grad_scale,
             const OptionalTensor& found_inf, const OptionalTensor& copy, const OptionalTensor& clipped) {
  run({{param, &grad, {&momentum}, copy.has_value() ? &*copy : nullptr}},
      {units, classes, lr, hyper, kHyperColumns, grad_scale, found_inf, clipped});
}

template <Run run>
void agc_sgd_list(at::TensorList params, at::TensorList grads, at::TensorList momenta, const Tensor& units,
                  at::IntArrayRef classes, const Tensor& lr, const Tensor& hyper, const OptionalTensor& grad_scale,
                  const OptionalTensor& found_inf, at::TensorList copies, const OptionalTensor& clipped) {
  run(operands_of(names, params, grads, {momenta}, copies),
      {units, classes, lr, hyper, kHyperColumns, grad_scale, found_inf, clipped});
}

template <Run run>
void write_copy(const Tensor& param, const Tensor& copy, const Tensor& units, at::IntArrayRef classes,
                const Tensor& hyper) {
  run({{param, nullptr, {}, &copy}},
      {units, classes, std::nullopt, hyper, kHyperColumns, std::nullopt, std::nullopt, std::nullopt});
}

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
      "hyper, *, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(c!)? copy=None, Tensor(d!)? clipped=None) -> "
      "()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "agc_sgd_list_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor units, int[] classes, Tensor "
      "lr, Tensor hyper, *, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(c!)[] copies, Tensor(d!)? "
      "clipped=None) -> ()",
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
