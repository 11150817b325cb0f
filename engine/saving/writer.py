"""Writes checkpoints beside training, which waits for a copy on the host and not for the disk.

The copy lies in memory that is taken for the first one and used again for each: weights, momentum and what else the
state has, 8 bytes a parameter in fp32, on rank 0 only, pinned where they come from a GPU. One is written at a time, and
the next waits for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from engine.saving.checkpoint import Weights
from loaders.errors import in_words

Write = Callable[[Weights, Mapping[str, Any]], bool]
"""Puts weights and a state on disk; False where that may be done later, and the reason has been told."""
_CHUNK = 2**30  # bytes taken at once: what is pinned comes in powers of two
_ALIGNED = 64  # bytes
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk."""

    step: int
    stall_s: float  # that training waited: for the copy, for the write before, and for this one where it is the last
    write_s: float  # that a thread wrote


class Writer:
    """Writes what it is handed in a thread of its own; without `background` at once. A context: leaving it waits.

    Errors of a write are raised by whatever asks for it next.
    """

    def __init__(self, background: bool = True) -> None:
        self._background = background
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._memory = HostMemory()
        self._under_way: tuple[int, Future[tuple[bool, float]]] | None = None
        self._stall = 0.0
        self._saved: list[Saved] = []
        self._untold: list[Saved] = []
        self._took = True

    def start(self, step: int, write: Write, weights: Weights, state: Mapping[str, Any]) -> None:
        """Hand over what is to be on disk, once what was handed over before is; it may change when this returns."""
        self.wait()
        self._stall, start = 0.0, time.perf_counter()
        if self._background:
            try:
                weights, state = self._memory.copy(weights, state)
            except (MemoryError, RuntimeError) as error:  # as torch says that there is no more
                self._background = False
                self._memory.free()
                _LOG.warning("warning: no memory for a copy of what is saved (%s): training waits for the disk", error)
        self._under_way = step, self._thread.submit(_timed, write, weights, state)
        self._stall += time.perf_counter() - start
        if not self._background:
            self.wait()

    def wait(self) -> bool:
        """Until nothing is being written. Whether the last that was handed over is on disk."""
        if self._under_way is not None:
            (step, future), self._under_way = self._under_way, None
            self._took, start = False, time.perf_counter()
            self._took, write_s = future.result()
            self._stall += time.perf_counter() - start
            if self._took:
                self._saved.append(Saved(step, self._stall, write_s))
        return self._took

    def finished(self) -> list[Saved]:
        """What came to be on disk since this was last asked. Does not wait."""
        if self._under_way is not None and self._under_way[1].done():
            self.wait()
        found, self._saved = self._saved, []
        self._untold += found
        return found

    def told(self) -> str:
        """What was finished since this was last asked, for people."""
        found, self._untold = self._untold, []
        write, stall = sum(saved.write_s for saved in found), sum(saved.stall_s for saved in found)
        return f"saved in {write:.1f} s, waited {stall:.2f} s" if found else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown()
        self._memory.free()
        try:
            self.wait()
        except OSError as unwritten:
            if error is None:
                raise
            _LOG.warning("warning: the checkpoint under way could not be written: %s", in_words(unwritten))


def _timed(write: Write, weights: Weights, state: Mapping[str, Any]) -> tuple[bool, float]:
    start = time.perf_counter()
    return write(weights, state), time.perf_counter() - start


class HostMemory:
    """Memory for copies of tensors, used again for others of the same kinds. Each copy has a storage of its own."""

    def __init__(self) -> None:
        self._kinds: list[tuple[Any, ...]] = []
        self._hosts: list[torch.Tensor] = []

    def copy(self, weights: Weights, state: Mapping[str, Any]) -> tuple[Weights, Mapping[str, Any]]:
        """The two with copies for their tensors, good until the next call. A GPU is waited for.

        Weights become contiguous, as they are written; what is in the state keeps its order in memory.
        """
        dense = [value.detach() for value in weights.values()]
        others = [value.detach() for value in _tensors(state)]
        kinds = [_kind(value, dense=True) for value in dense] + [_kind(value, dense=False) for value in others]
        pinned = any(value.is_cuda for value in (*dense, *others))
        if kinds != self._kinds:
            self.free()
            self._hosts = _taken(kinds, pinned)
            self._kinds = kinds
        copy_all(self._hosts, [*dense, *others])
        if pinned:
            torch.cuda.current_stream(next(value.device for value in (*dense, *others) if value.is_cuda)).synchronize()
        hosts = iter(self._hosts)
        return {name: next(hosts) for name in weights}, _replaced(state, hosts)

    def free(self) -> None:
        self._kinds, self._hosts = [], []


def copy_all(hosts: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Put the copies of `values` on their streams. Where the places are pinned the host does not wait."""
    for host, value in zip(hosts, values, strict=True):
        host.copy_(value, non_blocking=True)


def _kind(value: torch.Tensor, dense: bool) -> tuple[Any, ...]:
    how = torch.contiguous_format if dense else torch.preserve_format
    return value.dtype, value.shape, torch.empty_like(value, device="meta", memory_format=how).stride(), value.is_cuda


def _taken(kinds: Sequence[tuple[Any, ...]], pinned: bool) -> list[torch.Tensor]:
    """A tensor on the host for each kind. Many share a chunk of memory, but none a storage: that is what is saved."""
    sizes = [shape.numel() * dtype.itemsize for dtype, shape, *_ in kinds]
    left = sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)
    chunk, at, found = torch.empty(0, dtype=torch.uint8), 0, []
    for size, (dtype, shape, strides, _) in zip(sizes, kinds, strict=True):
        if at + size > len(chunk):
            chunk, at = torch.empty(max(size, min(left, _CHUNK)), dtype=torch.uint8, pin_memory=pinned), 0
        place = torch.from_numpy(chunk.numpy()[at : at + size])
        found.append(place.view(dtype).as_strided(shape, strides))
        at += -(-size // _ALIGNED) * _ALIGNED
        left -= -(-size // _ALIGNED) * _ALIGNED
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among dicts, lists and tuples, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _tensors(each)


def _replaced(value: Any, hosts: Iterator[torch.Tensor]) -> Any:
    """The same with the next of `hosts` for each tensor."""
    if isinstance(value, torch.Tensor):
        return next(hosts)
    if isinstance(value, Mapping):
        return {name: _replaced(each, hosts) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(each, hosts) for each in value)
    return value
