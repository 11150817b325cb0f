"""What a network does not keep for its backward pass, but makes anew there: memory against time.

none: a convolution keeps its input, a norm its own. norm: the input of a convolution is made anew from that of the norm
before it, which is kept anyway. unit: only what enters a unit is kept, and all of it is computed again. The numbers
that come out are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

RECOMPUTE = ("none", "norm", "unit")


@dataclass(frozen=True)
class _Rebuilt:
    """Stands for a tensor in the graph."""

    make: Callable[[], Tensor]


def made_anew(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager:
    """Operations inside keep, in the place of `tensor`, a promise that `make()` gives it again.

    `make` must hold no tensor whose graph holds these operations.
    """
    storage = tensor.untyped_storage()._cdata

    def pack(kept: Tensor) -> Any:
        same = kept.untyped_storage()._cdata == storage and kept.shape == tensor.shape
        return _Rebuilt(make) if same else kept

    def unpack(packed: Any) -> Tensor:
        if not isinstance(packed, _Rebuilt):
            return packed
        with torch.no_grad():
            return packed.make()

    return saved_tensors_hooks(pack, unpack)


def computed_again(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, of which only x is kept for the backward pass. It draws no random numbers."""
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
