"""Inputs that the tests of group norm with ReLU share, and the float64 oracle that they are held to."""

import torch

from engine.network import norm

DTYPES = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
"""Bounds of an error relative to the largest element: the last rounding, and for float32 that of sums."""
CHANNELS_LAST = torch.channels_last
SHAPES = [  # (shape, groups)
    ((2, 64, 13, 11), 32),
    ((1, 96, 31, 20), 32),
    ((5, 7, 3, 2), 7),
    ((3, 6, 1, 1), 2),
    ((2, 33, 17, 9), 3),
    ((1, 4, 64, 67), 1),
    ((9, 160, 7, 7), 32),
    ((1, 1, 5, 5), 1),
    ((4, 12), 3),
    ((2, 8, 300), 4),
    ((2, 8, 3, 4, 5), 4),
]


def case(shape, dtype, layout=torch.contiguous_format, mean=0.0, seed=0):
    """Input, weight, bias, gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    layout = layout if len(shape) == 4 else torch.contiguous_format
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    return (x + mean).to(dtype).contiguous(memory_format=layout), weight, bias, grad.to(dtype)


def shortcut_of(grad):
    """Another gradient like it."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(grad.shape, generator=generator).to(grad.dtype).to(memory_format=_layout(grad))


def _layout(x):
    last = x.ndim == 4 and x.is_contiguous(memory_format=CHANNELS_LAST)
    return CHANNELS_LAST if last else torch.contiguous_format


def through(function, x, weight, bias, grad, groups, eps=1e-5):
    """Output, and gradients of input, weight, bias."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves, groups, eps)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def through_beside(x, weight, bias, grad, shortcut, groups, eps=1e-5):
    """As `through`, where x goes around the norm as well, and `shortcut` is the gradient that comes back from there."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    outputs = norm.beside_shortcut(*leaves, groups, eps)
    return [outputs[0].detach(), *torch.autograd.grad(outputs, leaves, (grad, shortcut))]


def with_shortcut(expected, shortcut):
    """What `exact` gives, with a shortcut's gradient in that of the input."""
    return [expected[0], expected[1] + shortcut.double(), *expected[2:]]


def exact(x, weight, bias, grad, groups, eps=1e-5):
    return through(norm.plain, *(t.double() for t in (x, weight, bias, grad)), groups, eps)


def agrees(found, expected, bounds):
    for name, ours, right, bound in zip(("y", "dx", "dweight", "dbias"), found, expected, bounds, strict=True):
        assert torch.isfinite(ours).all(), name
        assert (ours.double() - right).abs().max() <= bound * right.abs().max().clamp(min=1e-2), name
