"""The BiT network family: pre-activation ResNets with group norm and weight standardization.

Architecture of "Big Transfer" (arXiv 1912.11370, section 2.1) with the module names, parameter keys, padding
and defaults of its published PyTorch code, so that checkpoints of that code load as they are. In short:

* root: 7x7 stride-2 convolution, zero padding of 1, 3x3 stride-2 max pool without padding;
* body: `depths` bottleneck units a block; group norm and ReLU before each convolution; the stride is on the
  3x3; the projection shortcut is a 1x1 convolution of the pre-activated input;
* head: group norm, ReLU, global average, 1x1 convolution with bias;
* every convolution but the head's standardizes its kernel (arXiv 1903.10520), and none has a bias.

Convolutions start from PyTorch's default, as in the published code; with standardized kernels their scale
changes the effective learning rate only, not the function. The head starts at zero, as that code does for a
new head.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network import norm, products, recompute
from engine.network.family import MEMBERS, BitSpec, Cost, cost, member
from loaders.errors import UserError

__all__ = ["MEMBERS", "Bit", "BitSpec", "Cost", "build", "cost", "standardize"]

STD_EPS = 1e-10
"""Added to the variance of a kernel, as published (timm has 1e-8; the difference is far below fp32
accuracy)."""


class StdConv2d(nn.Conv2d):
    """Convolution with a standardized kernel: zero mean, unit (biased) variance over each output row.

    Where `standardized` is set, it is read in the place of the weight: a training loop keeps it up to date.
    """

    standardized: Tensor | None = None

    def kernel(self) -> Tensor:
        """The standardized one."""
        return standardize(self.weight) if self.standardized is None else self.standardized

    def forward(self, x: Tensor) -> Tensor:
        """(b, in, h, w) → (b, out, h', w')."""
        kernel = self.kernel()
        if self._is((1, 1), (0, 0)) and self.stride == (1, 1) and products.fits(x, kernel):
            return products.convolve(x, kernel)
        if self._is((3, 3), (1, 1)) and products.fits_patches(x, kernel, self.stride[0]):
            return products.convolve_patches(x, kernel, self.stride[0])
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def _is(self, kernel_size: tuple[int, int], padding: tuple[int, int]) -> bool:
        """Whether it is a plain convolution of this kind, as all of the family are."""
        alike = self.kernel_size == kernel_size and self.padding == padding and self.padding_mode == "zeros"
        even = self.stride[0] == self.stride[1] and self.dilation == (1, 1)
        return alike and even and self.groups == 1 and self.bias is None


def standardize(weight: Tensor) -> Tensor:
    """(out, in, h, w) → same shape and dtype, each `weight[i]` with mean 0 and biased variance 1.

    In fp32 at least, also under autocast and for half weights: a kernel's mean is small beside its elements,
    and their difference would lose most of a half's 8 or 11 bits. arXiv 1903.10520, equation 10, epsilon as
    published.
    """
    rows = weight.to(torch.promote_types(weight.dtype, torch.float32))
    channels_last = not rows.is_contiguous() and rows.is_contiguous(memory_format=torch.channels_last)
    if channels_last:
        rows = rows.permute(0, 2, 3, 1)
    # A layer norm without affine is the same formula, in one pass each way: 7 times faster than mean and
    # variance followed by arithmetic (R50x1, one core).
    rows = F.layer_norm(rows, rows.shape[1:], eps=STD_EPS)
    if channels_last:
        rows = rows.permute(0, 3, 1, 2)
    return rows.to(weight.dtype)


class GroupNormReLU(nn.GroupNorm):
    """Group norm and the ReLU that always follows it in a pre-activation network, eps 1e-5."""

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, *, shortcut: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, *, shortcut: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(b, c, h, w) → same; `shortcut`: and x, for what goes around the norm."""
        normalize = norm.beside_shortcut if shortcut else norm.group_norm_relu
        return normalize(x, self.weight, self.bias, self.num_groups, self.eps)

    def not_kept(self, x: Tensor, output: Tensor) -> AbstractContextManager:
        """Convolutions inside do not keep `output`, which is that of `x`, where the operator made it."""
        if not norm.fits(x, self.weight, self.bias):
            return nullcontext()  # torch's ReLU keeps it as well
        return recompute.made_anew(output, partial(self.forward, x.detach()))


class Unit(nn.Module):
    """Pre-activation bottleneck (arXiv 1603.05027) with the stride on the 3x3 convolution."""

    def __init__(self, cin: int, cout: int, stride: int, groups: int):
        super().__init__()
        self.recompute = "none"
        mid = cout // 4
        self.gn1 = GroupNormReLU(groups, cin)
        self.conv1 = StdConv2d(cin, mid, 1, bias=False)
        self.gn2 = GroupNormReLU(groups, mid)
        self.conv2 = StdConv2d(mid, mid, 3, stride, padding=1, bias=False)
        self.gn3 = GroupNormReLU(groups, mid)
        self.conv3 = StdConv2d(mid, cout, 1, bias=False)
        if stride != 1 or cin != cout:
            self.downsample: StdConv2d | None = StdConv2d(cin, cout, 1, stride, bias=False)
        else:
            self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        """(b, cin, h, w) → (b, cout, ⌈h/stride⌉, ⌈w/stride⌉)."""
        if self.recompute == "unit" and torch.is_grad_enabled():
            return recompute.computed_again(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.downsample is None:
            # Another module may stand in the place of the norm, as where a network is exported.
            beside = isinstance(self.gn1, GroupNormReLU)
            out, shortcut = self.gn1(x, shortcut=True) if beside else (self.gn1(x), x)
            with self._kept(self.gn1, x, out):
                inner = self.conv1(out)
        else:
            out = self.gn1(x)
            with self._kept(self.gn1, x, out):
                inner, shortcut = self._inner_and_projected(out, self.conv1, self.downsample)
        out = self.gn2(inner)
        with self._kept(self.gn2, inner, out):
            inner = self.conv2(out)
        out = self.gn3(inner)
        with self._kept(self.gn3, inner, out):
            return self._joined(out, self.conv3, shortcut)

    @staticmethod
    def _inner_and_projected(x: Tensor, conv: nn.Module, projection: nn.Module) -> tuple[Tensor, Tensor]:
        if isinstance(conv, StdConv2d) and isinstance(projection, StdConv2d):
            kernel, other = conv.kernel(), projection.kernel()
            if products.fits_two(x, kernel, other):
                return products.convolve_two(x, kernel, other, projection.stride[0])
        return conv(x), projection(x)

    def _joined(self, x: Tensor, conv: nn.Module, shortcut: Tensor) -> Tensor:
        if self.downsample is not None and isinstance(conv, StdConv2d):  # else the shortcut is what the norm keeps
            kernel = conv.kernel()
            if products.fits_onto(shortcut, x, kernel):
                return products.convolve_onto(shortcut, x, kernel)
        return conv(x).add_(shortcut)

    def _kept(self, normalize: GroupNormReLU, x: Tensor, output: Tensor) -> AbstractContextManager:
        return normalize.not_kept(x, output) if self.recompute == "norm" else nullcontext()


class Head(nn.Module):
    """Group norm, ReLU, global average, classifier."""

    def __init__(self, channels: int, num_classes: int, groups: int):
        super().__init__()
        self.gn = GroupNormReLU(groups, channels)
        self.conv = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, num_classes)."""
        pooled = self.gn(x).mean((2, 3), keepdim=True)
        return self.conv(pooled).flatten(1)


class Bit(nn.Module):
    """A network of the family."""

    def __init__(self, spec: BitSpec, num_classes: int):
        super().__init__()
        self.spec = spec
        self.root = _root(spec)
        self.body = nn.Sequential()
        cin = spec.root_channels
        for i, (depth, cout) in enumerate(zip(spec.depths, spec.block_channels, strict=True), start=1):
            units = nn.Sequential()
            for j in range(1, depth + 1):
                stride = 2 if i > 1 and j == 1 else 1
                units.add_module(f"unit{j:02d}", Unit(cin, cout, stride, spec.groups))
                cin = cout
            self.body.add_module(f"block{i}", units)
        self.head = Head(cin, num_classes, spec.groups)

    def forward(self, x: Tensor) -> Tensor:
        """Images (b, 3, h, w) → logits (b, num_classes)."""
        return self.head(self.body(self.root(x)))


def _root(spec: BitSpec) -> nn.Sequential:
    root = nn.Sequential()
    if spec.root == "imagenet":
        root.add_module("conv", StdConv2d(3, spec.root_channels, 7, 2, padding=3, bias=False))
        # Not MaxPool2d(padding=1), which pads with -inf: a border that is negative everywhere comes out as 0
        # here.
        root.add_module("pad", nn.ConstantPad2d(1, 0.0))
        root.add_module("pool", nn.MaxPool2d(3, 2))
    else:
        stride = {"half": 2, "same": 1}[spec.root]
        root.add_module("conv", StdConv2d(3, spec.root_channels, 3, stride, padding=1, bias=False))
    return root


def build(name: str, num_classes: int, *, zero_head: bool = True, recompute: str = "none") -> Bit:
    """The network `name` of `MEMBERS`, freshly initialized, on the default device (`with
    torch.device("meta")` gives shapes without memory).

    `zero_head` starts the classifier at zero; otherwise it has PyTorch's default. `recompute`: one of `RECOMPUTE`.
    UserError for an unknown name or no classes.
    """
    spec = member(name)
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}; expected 1 or more: is the pack labelled?")
    model = Bit(spec, num_classes)
    for module in model.modules():
        if isinstance(module, Unit):
            module.recompute = recompute
    if zero_head:
        nn.init.zeros_(model.head.conv.weight)
        nn.init.zeros_(cast(Tensor, model.head.conv.bias))
    return model
