"""Where tensors lie in memory: views of one buffer, or each for itself."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_HUGE = 2 << 20  # bytes of a huge page on x86-64; where they are larger, a buffer that is smaller gets none


@dataclass(frozen=True)
class FlatSpan:
    """Parameters that are views of one buffer: where it begins, and how long it is, in elements."""

    first: Tensor
    begin: int
    length: int
    params: Sequence[Tensor]

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> FlatSpan | None:
        """The span of `params`, None where they lie in different buffers or sparsely in one."""
        full = [param for param in params if param.numel()]
        if not full or len({param.untyped_storage().data_ptr() for param in full}) != 1:
            return None
        begin = min(int(param.storage_offset()) for param in full)
        end = max(int(param.storage_offset()) + param.numel() for param in full)
        numel = sum(param.numel() for param in full)
        return cls(full[0], begin, end - begin, params) if numel <= end - begin <= 2 * numel else None

    def offset(self, param: Tensor) -> int:
        """Elements of the span before `param`; 0 where it is empty, and so anywhere."""
        return int(param.storage_offset()) - self.begin if param.numel() else 0

    def shift(self, tensors: Sequence[Tensor | None]) -> int | None:
        """How much further in their buffer `tensors` lie than the parameters in theirs; None where they are not views
        of one buffer that has the parameters' order, layouts and gaps."""
        pairs = [(p, t) for p, t in zip(self.params, tensors, strict=True) if p.numel()]
        shifts, buffers = set(), set()
        for p, t in pairs:
            if t is None or not same_layout(p, t):
                return None
            shifts.add(int(t.storage_offset()) - int(p.storage_offset()))
            buffers.add((t.untyped_storage().data_ptr(), t.dtype))
        return shifts.pop() if len(shifts) == len(buffers) == 1 else None

    def whole(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The part of the tensors' buffer that corresponds to the span, 1-D."""
        some = next(t for p, t in zip(self.params, tensors, strict=True) if p.numel())
        shift = self.shift(tensors)
        assert some is not None and shift is not None, "the tensors are no views of one buffer"
        return some.detach().as_strided((self.length,), (1,), self.begin + shift)

    def view(self, buffer: Tensor, param: Tensor) -> Tensor:
        """The parameter's part of `buffer`, which is as long as the span, in its shape and layout."""
        if not param.numel():
            return torch.empty_like(param.detach(), dtype=buffer.dtype)
        return buffer.as_strided(param.shape, param.stride(), buffer.storage_offset() + self.offset(param))

    def buffer(self, found: Sequence[Tensor | None]) -> Tensor:
        """One float32 buffer with the tensors `found`, zero where there is none yet: theirs, if it is one already."""
        if self.shift(found) is not None:
            return self.whole(found)
        buffer = zeros(self.length, self.first.device)
        for param, tensor in zip(self.params, found, strict=True):
            if tensor is not None and param.numel():
                self.view(buffer, param).copy_(tensor)
        return buffer


def zeros(numel: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """1-D zeros. On a CPU Linux is asked for huge pages: a step reads and writes several buffers at once, and looks up
    fewer addresses then (docs/log.md has what that is worth). Memory that the process used before keeps small ones."""
    if device.type != "cpu" or numel * dtype.itemsize < 2 * _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(numel, device=device, dtype=dtype)
    buffer = torch.empty(numel, device=device, dtype=dtype)
    if type(buffer) is Tensor:  # a fake one has no memory
        begin = -(-buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (buffer.data_ptr() + buffer.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        # What it answers does not matter: where there are no huge pages, small ones do.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
    return buffer.zero_()


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of a shape number their elements alike; the stride of a dimension of 1 means nothing."""
    sizes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.shape == b.shape and (a.numel() == 0 or all(n == 1 or s == t for n, s, t in sizes))


def laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    """`grad`, or where it is laid out otherwise than `param`, a copy that is not."""
    return grad if same_layout(param, grad) else torch.empty_like(param.detach(), dtype=grad.dtype).copy_(grad)
