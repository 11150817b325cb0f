"""How much memory a forward pass keeps for its backward pass, counted without a device or memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["saved_bytes"]


def saved_bytes(forward: Callable[[], object], *, beside: frozenset[int] = frozenset()) -> int:
    """Bytes of what autograd keeps of `forward()`: each storage once, however many views of it are kept.

    Storages of `beside` (`torch.UntypedStorage._cdata`, those of the parameters for instance) do not count. Nothing is
    allocated where `forward` works on meta or fake tensors.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in beside:
            # The storage itself is held: another one could get its address otherwise.
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in kept.values())
