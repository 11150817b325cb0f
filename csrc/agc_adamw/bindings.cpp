// The operators of AdamW behind AGC: schemas and dispatch.
#include <ATen/ops/empty.h>

#ifdef BOOSTERBIT_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <vector>

#include "../agc/call.h"
#include "../families.h"
#include "rule.h"

namespace boosterbit {
namespace {

constexpr int64_t kHyperColumns = sizeof(AgcAdamW<true>::Hyper) / sizeof(float);

template <class Rule>
Count<Rule> count_of(const Operands& operands, const Tables& tables, const Tensor& steps, typename Rule::Rate* rates) {
  const Names& names = kNames<Rule>;
  check_here(names, operands.front().param, steps, "step", at::kFloat);
  TORCH_CHECK(steps.numel() == 1, names.op, ": step has ", steps.numel(), " values; 1 expected");
  bump(steps);
  return {steps.mutable_data_ptr<float>(),
          pointer<float>(tables.lr),
          tables.lr->numel() > 1 ? 1 : 0,
          reinterpret_cast<const typename Rule::Hyper*>(tables.hyper.const_data_ptr<float>()),
          tables.hyper.size(0),
          pointer<float>(tables.found_inf),
          rates};
}

template <class Rule>
struct OnCpu {
  static void run(const Operands& operands, const Tables& tables, const Tensor& steps) {
    Call<Rule> call = prepare<Rule>(operands, tables);
    check_units(kNames<Rule>, tables.units, operands, tables.hyper.size(0));
    std::vector<typename Rule::Rate> rates(tables.hyper.size(0));
    const Count<Rule> count = count_of<Rule>(operands, tables, steps, rates.data());
    if (count.found_inf && *count.found_inf != 0.0f) return;
    ++*count.steps;
    for (int64_t group = 0; group < count.groups; ++group)
      rates[group] = Rule::rate_of(count.hyper[group], count.lr[group * count.lr_stride], *count.steps);
    call.step.rate = rates.data();
    call.step.rate_stride = 1;
    agc_adamw_cpu(call.step, call.arrays.data());
  }
};

#ifdef BOOSTERBIT_CUDA
template <class Rule>
struct OnCuda {
  static void run(const Operands& operands, const Tables& tables, const Tensor& steps) {
    const c10::cuda::CUDAGuard guard(operands.front().param.device());
    Call<Rule> call = prepare<Rule>(operands, tables);
    const ClassCounts counts = check_launch(kNames<Rule>, operands, tables.classes, Rule::kMaxTensors);
    constexpr int64_t kNumbers = sizeof(typename Rule::Rate) / sizeof(float);
    // The allocator gives it to nobody else before the work that is on this stream now has been done.
    const Tensor rates = at::empty({tables.hyper.size(0), kNumbers}, tables.hyper.options());
    auto* first = reinterpret_cast<typename Rule::Rate*>(rates.mutable_data_ptr<float>());
    const Count<Rule> count = count_of<Rule>(operands, tables, steps, first);
    call.step.rate = first;
    call.step.rate_stride = 1;
    const char* error = agc_adamw_cuda(call.step, call.arrays.data(), static_cast<int>(operands.size()), counts, count,
                                       c10::cuda::getCurrentCUDAStream());
    TORCH_CHECK(error == nullptr, Rule::kName, ": the kernel was not launched: ", error);
  }
};
#endif

// Nothing to compute and nothing to return: tracing sees the mutation in the schema.
template <class Rule>
struct OnMeta {
  static void run(const Operands&, const Tables&, const Tensor&) {}
};

template <template <class> class On>
void run(const Operands& operands, const Tables& tables, const Tensor& steps, bool averages) {
  if (operands.empty()) return;
  if (averages) return On<AgcAdamW<true>>::run(operands, tables, steps);
  On<AgcAdamW<false>>::run(operands, tables, steps);
}

template <template <class> class On>
void agc_adamw(const Tensor& param, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
               const Tensor& units, at::IntArrayRef classes, const Tensor& lr, const Tensor& hyper, const Tensor& step,
               const OptionalTensor& ema, const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
               const OptionalTensor& copy, const OptionalTensor& clipped) {
  Operands operands{{param, &grad, {&exp_avg, &exp_avg_sq}, copy.has_value() ? &*copy : nullptr}};
  if (ema.has_value()) operands.front().states.push_back(&*ema);
  run<On>(operands, {units, classes, lr, hyper, kHyperColumns, grad_scale, found_inf, clipped}, step, ema.has_value());
}

template <template <class> class On>
void agc_adamw_list(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                    const Tensor& units, at::IntArrayRef classes, const Tensor& lr, const Tensor& hyper,
                    const Tensor& step, at::TensorList emas, const OptionalTensor& grad_scale,
                    const OptionalTensor& found_inf, at::TensorList copies, const OptionalTensor& clipped) {
  std::vector<at::TensorList> states{exp_avgs, exp_avg_sqs};
  if (!emas.empty()) states.push_back(emas);
  run<On>(operands_of(kNames<AgcAdamW<true>>, params, grads, states, copies),
          {units, classes, lr, hyper, kHyperColumns, grad_scale, found_inf, clipped}, step, !emas.empty());
}

template <template <class> class On>
void implement(torch::Library& m) {
  m.impl("agc_adamw_", &agc_adamw<On>);
  m.impl("agc_adamw_list_", &agc_adamw_list<On>);
}

void schemas(torch::Library& m) {
  m.def(
      "agc_adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor units, int[] "
      "classes, Tensor lr, Tensor hyper, Tensor(d!) step, *, Tensor(e!)? ema=None, Tensor? grad_scale=None, Tensor? "
      "found_inf=None, Tensor(f!)? copy=None, Tensor(g!)? clipped=None) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "agc_adamw_list_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor "
      "units, int[] classes, Tensor lr, Tensor hyper, Tensor(d!) step, *, Tensor(e!)[] emas, Tensor? grad_scale=None, "
      "Tensor? found_inf=None, Tensor(f!)[] copies, Tensor(g!)? clipped=None) -> ()",
      {at::Tag::pt2_compliant_tag});
}

}  // namespace

#ifdef BOOSTERBIT_CUDA
const Family agc_adamw_family = {&schemas, &implement<OnCpu>, &implement<OnCuda>, &implement<OnMeta>};
#else
const Family agc_adamw_family = {&schemas, &implement<OnCpu>, nullptr, &implement<OnMeta>};
#endif

}  // namespace boosterbit
