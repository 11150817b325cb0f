// Group norm with ReLU: schemas, checks, dispatch.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "../families.h"
#include "api.h"

namespace boosterbit {
namespace {

using at::Tensor;

NormDtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return NormDtype::f32;
    case at::kHalf: return NormDtype::f16;
    case at::kBFloat16: return NormDtype::bf16;
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
                    const c10::SymInt& groups) {
  TORCH_CHECK(grad.sym_sizes() == x.sym_sizes() && grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
              "group_norm_relu_backward: the gradient is ", grad.scalar_type(), " of shape ", grad.sym_sizes(),
              ", the input ", x.scalar_type(), " of ", x.sym_sizes());
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

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& input, const Tensor& gamma, const Tensor& beta,
                                               int64_t groups, double eps) {
  check(input, gamma, beta, groups);
  const Tensor x = input.contiguous(layout_of(input)), weight = to_float(gamma), bias = to_float(beta);
  Tensor y = empty_for(input), mean = statistics_for(x, groups), inverse = statistics_for(x, groups);
  if (x.numel() == 0) {  // no sample, or no pixel: nothing to normalize
    mean.zero_();
    inverse.fill_(1.0 / std::sqrt(eps));
    return {y, mean, inverse};
  }
  group_norm_relu_cpu({shape_of(x, groups), x.const_data_ptr(), weight.const_data_ptr<float>(),
                       bias.const_data_ptr<float>(), eps, y.mutable_data_ptr(), mean.mutable_data_ptr<float>(),
                       inverse.mutable_data_ptr<float>()});
  return {y, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad, const Tensor& input, const Tensor& gamma,
                                                const Tensor& beta, const Tensor& mean, const Tensor& inverse,
                                                int64_t groups) {
  check(input, gamma, beta, groups);
  check_gradient(grad, input, mean, inverse, groups);
  const at::MemoryFormat layout = layout_of(input);
  const Tensor x = input.contiguous(layout), g = grad.contiguous(layout);
  const Tensor weight = to_float(gamma), bias = to_float(beta);
  Tensor grad_x = empty_for(input);
  Tensor grad_gamma = at::zeros_like(weight), grad_beta = at::zeros_like(bias);
  if (x.numel() != 0) {
    const Tensor parts = at::empty({2, x.size(0), x.size(1)}, weight.options());
    auto* part = parts.mutable_data_ptr<float>();
    group_norm_relu_backward_cpu({shape_of(x, groups), g.const_data_ptr(), x.const_data_ptr(),
                                  weight.const_data_ptr<float>(), bias.const_data_ptr<float>(),
                                  mean.const_data_ptr<float>(), inverse.const_data_ptr<float>(),
                                  grad_x.mutable_data_ptr(), part, part + x.size(0) * x.size(1),
                                  grad_gamma.mutable_data_ptr<float>(), grad_beta.mutable_data_ptr<float>()});
  }
  return {grad_x, grad_gamma.to(gamma.scalar_type()), grad_beta.to(beta.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> forward_meta(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                c10::SymInt groups, double) {
  check(x, gamma, beta, groups);
  return {empty_for(x), statistics_for(x, groups), statistics_for(x, groups)};
}

std::tuple<Tensor, Tensor, Tensor> backward_meta(const Tensor& grad, const Tensor& x, const Tensor& gamma,
                                                 const Tensor& beta, const Tensor& mean, const Tensor& inverse,
                                                 c10::SymInt groups) {
  check(x, gamma, beta, groups);
  check_gradient(grad, x, mean, inverse, groups);
  return {empty_for(x), at::empty_like(gamma), at::empty_like(beta)};
}

void schemas(torch::Library& m) {
  m.def(
      "group_norm_relu(Tensor input, Tensor weight, Tensor bias, SymInt groups, float eps) -> (Tensor output, Tensor "
      "mean, Tensor inverse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "group_norm_relu_backward(Tensor grad, Tensor input, Tensor weight, Tensor bias, Tensor mean, Tensor inverse, "
      "SymInt groups) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
}

void cpu(torch::Library& m) {
  m.impl("group_norm_relu", &forward_cpu);
  m.impl("group_norm_relu_backward", &backward_cpu);
}

void meta(torch::Library& m) {
  m.impl("group_norm_relu", &forward_meta);
  m.impl("group_norm_relu_backward", &backward_meta);
}

}  // namespace

// Constant-initialized, so that it is there whenever the registering file's statics run.
const Family group_norm_family = {&schemas, &cpu, nullptr, &meta};

}  // namespace boosterbit
