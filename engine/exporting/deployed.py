"""A tuned network as it is deployed: from RGB images in 0..1 to probabilities, in torch's own operations."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine.exporting.facts import Facts
from engine.network.bit import Bit, GroupNormReLU, StdConv2d, Unit, standardize

INPUT = "images"
OUTPUTS = ("probabilities", "logits")
_NEARLY_ZERO = 1e-30
"""What the root is padded with. Over zeros ONNX Runtime makes its padding and max pool one, whose border is -inf."""


class Deployed(nn.Module):
    """Images (b, 3, size, size) float32, RGB in 0..1, as `Facts.preprocessing` leaves them → probabilities and logits,
    (b, classes) float32 each.

    Normalization and calibration are inside. In float32 on the CPU, in evaluation mode.
    """

    def __init__(self, network: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.network = plain(network)
        scale, shift = facts.transform.normalization(1.0)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.from_numpy(scale).reshape(1, 3, 1, 1))
        self.register_buffer("shift", torch.from_numpy(shift).reshape(1, 3, 1, 1))
        self.temperature, self.several_labels = facts.temperature, facts.several_labels
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return self.answer(self.network(images * self.scale + self.shift))

    def answer(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What is said of the network's logits: probabilities and logits, calibrated."""
        if self.temperature is not None:
            logits = logits / self.temperature
        return logits.sigmoid() if self.several_labels else logits.softmax(1), logits


def plain(network: nn.Module) -> nn.Module:
    """A copy of a network, in float32 on the CPU, that has none of our operators, whose kernels are standardized once,
    not in each pass, and which runtimes take as it is."""
    result = copy.deepcopy(network).cpu().float().to(memory_format=torch.contiguous_format).eval()
    if not isinstance(result, Bit):
        return result
    for module in list(result.modules()):
        if isinstance(module, Unit):
            module.recompute = "none"
        for name, child in list(module.named_children()):
            if isinstance(child, StdConv2d):
                setattr(module, name, _convolution(child))
            elif isinstance(child, nn.ConstantPad2d):
                setattr(module, name, nn.ConstantPad2d(child.padding, _NEARLY_ZERO))
            elif isinstance(child, GroupNormReLU):
                setattr(module, name, _norm(child))
    return result


def _convolution(own: StdConv2d) -> nn.Conv2d:
    shape = cast(tuple[Any, Any, Any], (own.kernel_size, own.stride, own.padding))
    result = nn.Conv2d(own.in_channels, own.out_channels, *shape, bias=False, device="meta")
    result.weight = nn.Parameter(standardize(own.weight.detach()), requires_grad=False)
    return result


def _norm(own: GroupNormReLU) -> nn.Sequential:
    norm = nn.GroupNorm(own.num_groups, own.num_channels, own.eps, device="meta")
    norm.weight, norm.bias = own.weight, own.bias
    return nn.Sequential(norm, nn.ReLU())
