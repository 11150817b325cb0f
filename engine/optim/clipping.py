"""Adaptive gradient clipping (AGC) in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

TINY_NORM = 1e-6
"""Gradient norms below this count as this in the quotient, as in the published AGC code."""


def adaptive_clip(params: Sequence[Tensor], grads: Sequence[Tensor], clipping: float, eps: float) -> list[Tensor]:
    """The gradients, each unit scaled down to a norm of `clipping * max(norm of its parameters, eps)` at
    most.

    A unit is an output row (`p[i]`) of a parameter with 2 or more dimensions, and the whole of one with
    fewer. The quotient is `max_norm / max(grad_norm, 1e-6)`, used only where `grad_norm > max_norm`. Norms
    are in fp32 at least: a gradient row with a norm over 1.8e19 counts as infinite and becomes zero. Returns
    new tensors, in the gradients' dtypes. arXiv 2102.06171, equation 3, with the details of its published
    code.
    """
    if not grads:
        return []
    param_norms = [_unit_norm(p) for p in params]
    grad_norms = [_unit_norm(g) for g in grads]
    limits = torch._foreach_mul(torch._foreach_maximum(param_norms, eps), clipping)
    quotients = torch._foreach_div(limits, torch._foreach_maximum(grad_norms, TINY_NORM))
    # `where` and not a minimum with 1: below TINY_NORM the quotient is not the test.
    scales = [
        torch.where(norm > limit, quotient, 1.0)
        for norm, limit, quotient in zip(grad_norms, limits, quotients, strict=True)
    ]
    return [(g * scale).to(g.dtype) for g, scale in zip(grads, scales, strict=True)]


def adaptive_clip_(params: Sequence[Tensor], grads: Sequence[Tensor], clipping: float, eps: float) -> None:
    """`adaptive_clip` in place."""
    for g, clipped in zip(grads, adaptive_clip(params, grads, clipping, eps), strict=True):
        g.copy_(clipped)


def _unit_norm(x: Tensor) -> Tensor:
    """(o, ...) → (o, 1, ...), and 0-D or 1-D → 0-D: the units' 2-norms."""
    dims = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    return torch.linalg.vector_norm(x, dim=dims, keepdim=x.ndim > 1, dtype=wide(x.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
