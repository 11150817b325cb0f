// Group norm with ReLU: schemas, checks, dispatch.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#ifdef BOOSTERBIT_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <cmath>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>

#include "../families.h"
#include "api.h"
#include "tiles.h"

namespace boosterbit {
namespace {

using at::Tensor;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default:
      TORCH_CHECK(false, "group_norm_relu: the input is ", x.scalar_type(), "; float32, float16 or bfloat16 expected");
  }
}

void check(const Tensor& x, const Tensor& gamma, const Tensor& beta, const c10::SymInt& groups) {
  TORCH_CHECK(x.dim() >= 2, "group_norm_relu: the input has ", x.dim(), " dimensions; (batch, channels, …) expected");
  TORCH_CHECK(groups >= 1 && x.sym_size(1) % groups == 0 && x.sym_size(1) > 0, "group_norm_relu: ", x.sym_size(1),
              " channels do not make ", groups, " equal groups");
  dtype_of(x);
  for (const auto& [tensor, name] : {std::pair(gamma, "weight"), std::pair(beta, "bias")}) {
    TORCH_CHECK(tensor.dim() == 1 && tensor.sym_size(0) == x.sym_size(1), "group_norm_relu: the ", name, " has shape ",
                tensor.sym_sizes(), "; (", x.sym_size(1), ") expected");
    TORCH_CHECK(tensor.device() == x.device(), "group_norm_relu: the ", name, " is on ", tensor.device(),
                ", the input on ", x.device());
    TORCH_CHECK(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == x.scalar_type(), "group_norm_relu: the ",
                name, " is ", tensor.scalar_type(), "; float32 or the input's ", x.scalar_type(), " expected");
  }
}

void check_gradient(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& inverse,
                    const c10::SymInt& groups, const std::optional<Tensor>& shortcut) {
  const auto like_input = [&](const Tensor& found, const char* name) {
    TORCH_CHECK(
        found.sym_sizes() == x.sym_sizes() && found.scalar_type() == x.scalar_type() && found.device() == x.device(),
        "group_norm_relu_backward: the ", name, " is ", found.scalar_type(), " of shape ", found.sym_sizes(),
        ", the input ", x.scalar_type(), " of ", x.sym_sizes());
  };
  like_input(grad, "gradient");
  if (shortcut) like_input(*shortcut, "shortcut's gradient");
  for (const Tensor& saved : {mean, inverse}) {
    TORCH_CHECK(saved.scalar_type() == at::kFloat && saved.dim() == 2 && saved.sym_size(0) == x.sym_size(0) &&
                    saved.sym_size(1) == groups && saved.is_contiguous() && saved.device() == x.device(),
                "group_norm_relu_backward: the statistics must be contiguous float32 of shape (batch, groups), found ",
                saved.scalar_type(), " of ", saved.sym_sizes());
  }
}

// Which of the two layouts the operator works in: the input's where it is one of them, else contiguous.
at::MemoryFormat layout_of(const Tensor& x) {
  return x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast) ? at::MemoryFormat::ChannelsLast
                                                                         : at::MemoryFormat::Contiguous;
}

// An activation laid out as the input is, or contiguous where the input is in neither layout.
Tensor empty_for(const Tensor& x) {
  const at::MemoryFormat layout = layout_of(x);
  return at::empty_like(x, x.options(), x.is_contiguous(layout) ? at::MemoryFormat::Preserve : layout);
}

Tensor statistics_for(const Tensor& x, const c10::SymInt& groups) {
  return at::empty_symint({x.sym_size(0), groups}, x.options().dtype(at::kFloat));
}

NormShape shape_of(const Tensor& x, int64_t groups) {
  const int64_t batch = x.size(0), channels = x.size(1);
  int64_t pixels = 1;
  for (int64_t d = 2; d < x.dim(); ++d) pixels *= x.size(d);
  return NormShape{batch, channels, pixels, groups, layout_of(x) == at::MemoryFormat::ChannelsLast, dtype_of(x)};
}

Tensor to_float(const Tensor& parameter) { return parameter.to(at::kFloat).contiguous(); }

// What runs where the tensors are. `parts(shape, …)`: into how many parts each sample's gradients of gamma and beta are
// cut.
struct Cpu {
  explicit Cpu(const Tensor&) {}
  int64_t parts(const NormShape&, std::initializer_list<const void*>, int) { return 1; }
  void run(const NormForward& call) { group_norm_relu_cpu(call); }
  void run(const NormBackward& call) { group_norm_relu_backward_cpu(call); }
};

#ifdef BOOSTERBIT_CUDA
class Cuda {
 public:
  explicit Cuda(const Tensor& x) : guard_(x.device()), options_(x.options().dtype(at::kDouble)) {}

  // Makes the plan for `arrays` activations that are read.
  int64_t parts(const NormShape& s, std::initializer_list<const void*> activations, int arrays) {
    constexpr int64_t kMost = int64_t{1} << 30;
    TORCH_CHECK(s.channels < kMost && s.pixels < kMost, "group_norm_relu: ", s.channels, " channels of ", s.pixels,
                " elements; less than ", kMost, " of each expected on a GPU");
    NormDevice device{};
    check(norm_device(device));
    bool aligned = true;
    for (const void* x : activations) aligned = aligned && reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0;
    plan_ = norm_plan(s, aligned, arrays, device);
    if (plan_.parts > 1) work_ = at::empty({s.batch * s.groups * plan_.parts * 2}, options_);
    return plan_.parts;
  }
  void run(const NormForward& call) { check(group_norm_relu_cuda(call, plan_, work(), stream())); }
  void run(const NormBackward& call) { check(group_norm_relu_backward_cuda(call, plan_, work(), stream())); }

 private:
  static void check(const char* error) {
    TORCH_CHECK(error == nullptr, "group_norm_relu: the kernel was not launched: ", error);
  }
  static void* stream() { return c10::cuda::getCurrentCUDAStream(); }
  double* work() { return work_.defined() ? work_.mutable_data_ptr<double>() : nullptr; }

  c10::cuda::CUDAGuard guard_;
  at::TensorOptions options_;
  NormPlan plan_{};
  Tensor work_;
};
#endif

template <class Device>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& gamma, const Tensor& beta, int64_t groups,
                                           double eps) {
  check(input, gamma, beta, groups);
  Device device(input);
  const Tensor x = input.contiguous(layout_of(input)), weight = to_float(gamma), bias = to_float(beta);
  Tensor y = empty_for(input), mean = statistics_for(x, groups), inverse = statistics_for(x, groups);
  if (x.numel() == 0) {  // no sample, or no pixel: nothing to normalize
    mean.zero_();
    inverse.fill_(1.0 / std::sqrt(eps));
    return {y, mean, inverse};
  }
  const NormForward call{shape_of(x, groups),
                         x.const_data_ptr(),
                         weight.const_data_ptr<float>(),
                         bias.const_data_ptr<float>(),
                         eps,
                         y.mutable_data_ptr(),
                         mean.mutable_data_ptr<float>(),
                         inverse.mutable_data_ptr<float>()};
  device.parts(call.shape, {call.x, call.y}, 1);
  device.run(call);
  return {y, mean, inverse};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& gamma,
                                            const Tensor& beta, const Tensor& mean, const Tensor& inverse,
                                            int64_t groups, const std::optional<Tensor>& shortcut) {
  check(input, gamma, beta, groups);
  check_gradient(grad, input, mean, inverse, groups, shortcut);
  Device device(input);
  const at::MemoryFormat layout = layout_of(input);
  const Tensor x = input.contiguous(layout), g = grad.contiguous(layout);
  const Tensor more = shortcut ? shortcut->contiguous(layout) : Tensor();
  const Tensor weight = to_float(gamma), bias = to_float(beta);
  Tensor grad_x = empty_for(input);
  if (x.numel() == 0) return {grad_x, at::zeros_like(gamma), at::zeros_like(beta)};
  Tensor grad_gamma = at::empty_like(weight), grad_beta = at::empty_like(bias);
  NormBackward call{shape_of(x, groups),
                    g.const_data_ptr(),
                    x.const_data_ptr(),
                    weight.const_data_ptr<float>(),
                    bias.const_data_ptr<float>(),
                    mean.const_data_ptr<float>(),
                    inverse.const_data_ptr<float>(),
                    shortcut ? more.const_data_ptr() : nullptr,
                    grad_x.mutable_data_ptr(),
                    nullptr,
                    nullptr,
                    grad_gamma.mutable_data_ptr<float>(),
                    grad_beta.mutable_data_ptr<float>()};
  const int64_t rows = x.size(0) * device.parts(call.shape, {call.grad, call.x, call.shortcut, call.grad_x}, 2);
  const Tensor parts = at::empty({2, rows, x.size(1)}, weight.options());
  call.gamma_parts = parts.mutable_data_ptr<float>();
  call.beta_parts = call.gamma_parts + rows * x.size(1);
  device.run(call);
  return {grad_x, grad_gamma.to(gamma.scalar_type()), grad_beta.to(beta.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> forward_meta(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                c10::SymInt groups, double) {
  check(x, gamma, beta, groups);
  return {empty_for(x), statistics_for(x, groups), statistics_for(x, groups)};
}

std::tuple<Tensor, Tensor, Tensor> backward_meta(const Tensor& grad, const Tensor& x, const Tensor& gamma,
                                                 const Tensor& beta, const Tensor& mean, const Tensor& inverse,
                                                 c10::SymInt groups, const std::optional<Tensor>& shortcut) {
  check(x, gamma, beta, groups);
  check_gradient(grad, x, mean, inverse, groups, shortcut);
  return {empty_for(x), at::empty_like(gamma), at::empty_like(beta)};
}

void schemas(torch::Library& m) {
  m.def(
      "group_norm_relu(Tensor input, Tensor weight, Tensor bias, SymInt groups, float eps) -> (Tensor output, Tensor "
      "mean, Tensor inverse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "group_norm_relu_backward(Tensor grad, Tensor input, Tensor weight, Tensor bias, Tensor mean, Tensor inverse, "
      "SymInt groups, Tensor? shortcut=None) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
}

template <class Device>
void implement(torch::Library& m) {
  m.impl("group_norm_relu", &forward<Device>);
  m.impl("group_norm_relu_backward", &backward<Device>);
}

void meta(torch::Library& m) {
  m.impl("group_norm_relu", &forward_meta);
  m.impl("group_norm_relu_backward", &backward_meta);
}

}  // namespace

// Constant-initialized, so that it is there whenever the registering file's statics run.
#ifdef BOOSTERBIT_CUDA
const Family group_norm_family = {&schemas, &implement<Cpu>, &implement<Cuda>, &meta};
#else
const Family group_norm_family = {&schemas, &implement<Cpu>, nullptr, &meta};
#endif

}  // namespace boosterbit
