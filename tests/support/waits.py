"""Which operations on CUDA tensors make the host wait for the device, seen on fake ones: no GPU is needed."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select",
         "aten.unique_dim", "aten._unique2", "aten.allclose", "aten.lift_fresh"}  # fmt: skip
"""What has the device's numbers, or a shape made of them, at once; `lift_fresh` is a tensor made of Python's numbers,
which is copied from pageable memory."""


class Waits(TorchDispatchMode):
    """Notes in `found` each operation that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(func).rsplit(".", 1)[0]
        self.seen += 1
        copied = name in ("aten._to_copy", "aten.copy_") and not kwargs.get("non_blocking", _third(args))
        picked = name in ("aten.index", "aten.index_put_") and any(x.dtype == torch.bool for x in _tensors(args[1]))
        if name in READS or picked or (copied and len({x.device.type for x in _tensors([*args, out])}) > 1):
            self.found.append(name)
        return out


def _third(args) -> bool:
    return len(args) > 2 and bool(args[2])


def _tensors(values: Iterable) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
