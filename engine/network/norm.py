"""Group norm and the ReLU behind it as one operator, `boosterbit::group_norm_relu`, with an eager oracle.

    group_norm_relu(input, weight, bias, groups, eps) -> (output, mean, inverse)

`input` is float32, bfloat16 or float16 of shape (batch, channels, …), channels-last or contiguous, and `output` is of
the same shape, dtype and layout, also under autocast. `mean` and `inverse`, 1/σ with the biased variance, are float32
of shape (batch, groups): they and the input are what the backward pass keeps, which makes the ReLU's mask anew.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from engine import compiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def group_norm_relu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """relu(group_norm(x)): (b, c, …), parameters (c) → shape of x; by the operator where `fits`, else by torch."""
    if not fits(x, weight, bias):
        return plain(x, weight, bias, groups, eps)
    return _operator()(x, weight, bias, groups, eps)[0]


def beside_shortcut(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """The same, and x for the path that goes around it, as in a residual unit.

    The gradient that comes back on that path is added where the operator writes its own: no other pass over memory.
    """
    if not fits(x, weight, bias):
        return plain(x, weight, bias, groups, eps), x
    return _BesideShortcut.apply(x, weight, bias, groups, eps)


def plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """The same in torch's operations. The ReLU is in place: the norm's backward pass does not need its output."""
    return F.relu_(F.group_norm(x, groups, weight, bias, eps))


def fits(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the operator takes these tensors here: it is built for the device, knows the dtypes, and nothing traces.

    A compiler makes its own kernel of torch's operations, and subclasses of tensors may not know the operator; fake
    tensors do, for any device.
    """
    if x.dtype not in DTYPES or torch.compiler.is_compiling():
        return False
    if any(p.dtype not in (torch.float32, x.dtype) or p.device != x.device for p in (weight, bias)):
        return False
    return _built(x.device.type) if type(x) is Tensor else _is_fake(x) and compiled.loaded()


@cache
def _built(device: str) -> bool:
    return compiled.supports(torch.device(device), "group_norm_relu")


def _is_fake(x: Tensor) -> bool:
    """Whether nothing is computed with `x`, and so no kernel needed: memory is counted where there is no GPU."""
    from torch._subclasses.fake_tensor import FakeTensor  # brings torch's compiler with it

    return isinstance(x, FakeTensor)


@cache
def _operator() -> Any:
    """The operator, with its derivative registered."""
    compiled.loaded()
    torch.library.register_autograd("boosterbit::group_norm_relu", _backward, setup_context=_keep)
    return torch.ops.boosterbit.group_norm_relu.default


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, ctx.groups, _ = inputs
    _, mean, inverse = output
    ctx.mark_non_differentiable(mean, inverse)
    ctx.save_for_backward(x, weight, bias, mean, inverse)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    gradients = torch.ops.boosterbit.group_norm_relu_backward(grad, *ctx.saved_tensors, ctx.groups)
    return *gradients, None, None


class _BesideShortcut(torch.autograd.Function):
    """An operator of the dispatcher cannot give back its input, so that this is not one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        output, mean, inverse = torch.ops.boosterbit.group_norm_relu(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        return output, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, shortcut: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nothing asks for the norm
            return shortcut, None, None, None, None
        gradients = torch.ops.boosterbit.group_norm_relu_backward(grad, *ctx.saved_tensors, ctx.groups, shortcut)
        return *gradients, None, None
