"""How much memory a forward pass keeps for its backward pass, counted without a device or memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.network import bit

__all__ = ["autocast", "moved_bytes_per_image", "saved_bytes", "saved_bytes_per_image"]


Forward = Callable[[], object]


def saved_bytes(forward: Forward, *, beside: frozenset[int] = frozenset(), again: Sequence[nn.Module] = ()) -> int:
    """Bytes of what autograd keeps of `forward()`: each storage once, however many views of it are kept.

    Storages of `beside` (`torch.UntypedStorage._cdata`, those of the parameters for instance) do not count. Nothing is
    allocated where `forward` works on meta or fake tensors. `again`: modules that keep their inputs, to compute all the
    rest again, which autograd does not see.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in beside:
            # The storage itself is held: another one could get its address otherwise.
            kept[storage._cdata] = storage
        return tensor

    def keep_inputs(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for tensor in inputs:
            keep(tensor)

    hooks = [module.register_forward_pre_hook(keep_inputs) for module in again]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    for hook in hooks:
        hook.remove()
    del result
    return sum(storage.nbytes() for storage in kept.values())


def saved_bytes_per_image(name: str, size: int, dtype: torch.dtype, recompute: str = "none") -> int:
    """Bytes that each further image of `size` pixels adds to what network `name` keeps, channels-last on CUDA.

    Counted on fake tensors, so that neither a device nor memory is needed. A `dtype` other than float32 is that of
    autocast. What is kept once whatever the batch, such as standardized kernels, is not in it.
    """
    return _kept(name, size, dtype, recompute, 2) - _kept(name, size, dtype, recompute, 1)


def moved_bytes_per_image(name: str, size: int, dtype: torch.dtype, recompute: str = "none") -> int:
    """Bytes that the operations of a forward and backward pass read and write for each further image, counted as above.

    The backward pass counts as two of the forward pass, as its arithmetic does: it reads and writes gradients of inputs
    and of weights. What an operation finds in a cache counts as well.
    """
    counts = []
    for batch in (1, 2):
        moved = _Moved()
        with _network(name, size, recompute, batch) as (model, images), autocast(dtype), moved:
            model(images)
        counts.append(moved.bytes)
    return (3 + (recompute != "none")) * (counts[1] - counts[0])


class _Moved(TorchDispatchMode):
    """Adds up what operations read and write; a view is neither."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        there = {x.untyped_storage()._cdata for x in given}
        if func._schema.is_mutable or any(x.untyped_storage()._cdata not in there for x in made):
            self.bytes += sum(x.numel() * x.element_size() for x in (*given, *made))
        return out


@contextmanager
def _network(name: str, size: int, recompute: str, batch: int) -> Iterator[tuple[nn.Module, Tensor]]:
    """A network and images, channels-last on CUDA, that need neither."""
    with FakeTensorMode():
        with torch.device("cuda"):
            model = bit.build(name, 1000, recompute=recompute)
            images = torch.empty(batch, 3, size, size).to(memory_format=torch.channels_last)
        # Module.to cannot exchange fake parameters.
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(module.weight.detach().to(memory_format=torch.channels_last))
        yield model, images


def _kept(name: str, size: int, dtype: torch.dtype, recompute: str, batch: int) -> int:
    with _network(name, size, recompute, batch) as (model, images):
        own = frozenset(parameter.untyped_storage()._cdata for parameter in model.parameters())
        again = [module for module in model.modules() if isinstance(module, bit.Unit)] if recompute == "unit" else []
        with autocast(dtype):
            return saved_bytes(lambda: model(images), beside=own, again=again)


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast for CUDA, which switches itself off on a machine without a GPU: fake tensors need none."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype if dtype != torch.float32 else before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()
