"""How much memory a forward pass keeps for its backward pass, counted without a device or memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from engine.network import bit

__all__ = ["saved_bytes", "saved_bytes_per_image"]


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


def saved_bytes_per_image(name: str, size: int, dtype: torch.dtype) -> int:
    """Bytes that each further image of `size` pixels adds to what network `name` keeps, channels-last on CUDA.

    Counted on fake tensors, so that neither a device nor memory is needed. A `dtype` other than float32 is that of
    autocast. What is kept once whatever the batch, such as standardized kernels, is not in it.
    """
    return _kept(name, size, dtype, 2) - _kept(name, size, dtype, 1)


def _kept(name: str, size: int, dtype: torch.dtype, batch: int) -> int:
    with FakeTensorMode():
        with torch.device("cuda"):
            model = bit.build(name, 1000)
            images = torch.empty(batch, 3, size, size).to(memory_format=torch.channels_last)
        # Module.to cannot exchange fake parameters.
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(module.weight.detach().to(memory_format=torch.channels_last))
        own = frozenset(parameter.untyped_storage()._cdata for parameter in model.parameters())
        return saved_bytes(lambda: _cast(model, images, dtype), beside=own)


def _cast(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    # torch.autocast switches itself off on a machine without a GPU.
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype if dtype != torch.float32 else before[1])
    try:
        return model(images)
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()
