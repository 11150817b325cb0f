"""Convolutions on a CPU as products of matrices: of a channels-last map's pixels, or patches, and the kernel.

A 1x1 convolution, two of three in the family, is such a product; what several of them, or a residual sum, write to one
place is added up within the product, without a pass over memory of its own. The gradient of a 3x3 kernel over few
pixels is one of the map's patches. Where `fits…` says so these are faster than torch's convolutions, which they stand
for; docs/log.md ("convolutions as products") has the figures.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

DTYPES = (torch.float32, torch.bfloat16)
SMALL = 32 * 32
"""Pixels of a map up to which a single 1x1 convolution of float32 is a product; of bfloat16 all are."""
WIDE, FEW = 512, 2048
"""Channels from which, and pixels of all maps of an output up to which, a 3x3 kernel's gradient is taken from patches,
which are nine times the map."""


def fits(x: Tensor, kernel: Tensor) -> bool:
    """Whether `convolve` takes this input and kernel, and is faster than the convolution it stands for.

    Not where something traces: a compiler, and a format that networks are exported to, know convolutions better.
    """
    return taken(x, kernel) and (x.dtype == torch.bfloat16 or x.shape[2] * x.shape[3] <= SMALL)


def fits_two(x: Tensor, *kernels: Tensor) -> bool:
    """The same of `convolve_two`, which also saves a sum of gradients of the shape of x."""
    return all(taken(x, kernel) for kernel in kernels)


def fits_onto(total: Tensor, x: Tensor, kernel: Tensor) -> bool:
    """The same of `convolve_onto`."""
    return fits(x, kernel) and type(total) is Tensor and total.dtype == x.dtype and _is_channels_last(total)


def fits_patches(x: Tensor, kernel: Tensor, stride: int) -> bool:
    """The same of `convolve_patches`."""
    pixels = len(x) * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    return x.shape[1] >= WIDE and pixels <= FEW and torch.is_grad_enabled() and taken(x, kernel)


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """The convolution of x (b, in, h, w) with `kernel` (out, in, 1, 1): (b, out, h, w). Both channels-last."""
    return _Convolution.apply(x, kernel)


def convolve_two(x: Tensor, kernel: Tensor, other: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Two convolutions of one input: with `kernel`, and with `other` at each `stride`-th row and column.

    As of `convolve`; the second is (b, out, ⌈h/stride⌉, ⌈w/stride⌉).
    """
    return _TwoConvolutions.apply(x, kernel, other, stride)


def convolve_onto(total: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """total + convolve(x, kernel), written into `total`, which has that shape and is channels-last."""
    return _ConvolutionOnto.apply(total, x, kernel)


def convolve_patches(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """The convolution of x (b, in, h, w), with a border of zeros, with `kernel` (out, in, 3, 3):
    (b, out, ⌈h/stride⌉, ⌈w/stride⌉)."""
    return _PatchConvolution.apply(x, kernel, stride)


def taken(x: Tensor, kernel: Tensor) -> bool:
    """Whether any of these take this input and kernel."""
    if type(x) is not Tensor or type(kernel) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return False
    if x.device.type != "cpu" or kernel.device != x.device or x.dtype not in DTYPES or kernel.dtype != x.dtype:
        return False
    if x.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        return False
    return _are_faster(x.dtype) and _is_channels_last(x)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.permute(0, 2, 3, 1).is_contiguous()


@cache
def _are_faster(dtype: torch.dtype) -> bool:
    """Without AVX-512 products of bfloat16 have no library behind them, and those of float32 were not measured. With it
    those of bfloat16 are oneDNN's, as convolutions are. Those of float32 are Intel's MKL's, which on an AMD processor
    took longer than the convolutions (docs/log.md)."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and (dtype == torch.bfloat16 or "Intel" in str(_capabilities().get("cpu_name")))


def _capabilities() -> dict[str, Any]:
    known = getattr(torch.cpu, "get_capabilities", None)  # not in each PyTorch that we take
    return known() if known else {}


def _rows(x: Tensor) -> Tensor:
    """(b, c, h, w) → (b h w, c), a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _thinned(x: Tensor, stride: int) -> Tensor:
    return x if stride == 1 else x[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)


def _patches(x: Tensor, stride: int) -> Tensor:
    """(b, c, h, w) → (b ⌈h/stride⌉ ⌈w/stride⌉, 9 c): what a 3x3 kernel sees at each place, channels last."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    b, h, w, c = padded.shape
    shape = b, (h - 3) // stride + 1, (w - 3) // stride + 1, 3, 3, c
    image, row, pixel, channel = padded.stride()
    windows = padded.as_strided(shape, (image, row * stride, pixel * stride, row, pixel, channel))
    return windows.reshape(-1, 9 * c)


def _product(x: Tensor, kernel: Tensor) -> Tensor:
    # Written into a tensor of its own: no view that autograd would have to keep track of.
    shape = x.shape[0], len(kernel), *x.shape[2:]
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    torch.mm(_rows(x), kernel[:, :, 0, 0].t(), out=_rows(out))
    return out


def _to_input(grad: Tensor, kernel: Tensor) -> Tensor:
    """The gradient (b, in, h, w) of what gave an output whose gradient is `grad`."""
    return _product(grad, kernel.transpose(0, 1))


def _to_kernel(grad: Tensor, x: Tensor) -> Tensor:
    return (_rows(grad).t() @ _rows(x))[:, :, None, None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return _product(x, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        of_x, of_kernel = ctx.needs_input_grad
        return _to_input(grad, kernel) if of_x else None, _to_kernel(grad, x) if of_kernel else None


class _ConvolutionOnto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.mark_dirty(total)
        _rows(total).addmm_(_rows(x), kernel[:, :, 0, 0].t())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        _, of_x, of_kernel = ctx.needs_input_grad
        return grad, _to_input(grad, kernel) if of_x else None, _to_kernel(grad, x) if of_kernel else None


class _TwoConvolutions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, other: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, kernel, other)
        ctx.stride = stride
        return _product(x, kernel), _product(_thinned(x, stride), other)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, thin: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, other = ctx.saved_tensors
        of_x, of_kernel, of_other, _ = ctx.needs_input_grad
        total = None
        if of_x:
            total = _to_input(grad, kernel)
            if ctx.stride == 1:
                _rows(total).addmm_(_rows(thin), other[:, :, 0, 0])
            else:
                total[:, :, :: ctx.stride, :: ctx.stride] += _to_input(thin, other)
        of_rows = _to_kernel(grad, x) if of_kernel else None
        return total, of_rows, _to_kernel(thin, _thinned(x, ctx.stride)) if of_other else None, None


class _PatchConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.stride = stride
        return F.conv2d(x, kernel, None, stride, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        of_x, of_kernel, _ = ctx.needs_input_grad
        to_input = to_kernel = None
        if of_x:
            geometry = [ctx.stride] * 2, [1, 1], [1, 1], False, [0, 0], 1
            to_input = torch.ops.aten.convolution_backward(grad, x, kernel, None, *geometry, [True, False, False])[0]
        if of_kernel:
            product = _rows(grad).t() @ _patches(x, ctx.stride)
            to_kernel = product.view(len(kernel), 3, 3, -1).permute(0, 3, 1, 2)
        return to_input, to_kernel, None
