"""One small interface to the other ranks, and the process that runs alone.

Everything the engine says to other ranks goes through a `Communicator`; a library for it is named in its own file only.
Collectives are called by all ranks in the same order. Large ones are in place, on contiguous 1-D tensors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from engine.comm.launch import Launch
from loaders.errors import UserError

if TYPE_CHECKING:  # command lines that only inform know of communicators, and need not wait for torch
    import numpy as np
    import torch


class SharedError(UserError):
    """A UserError that all ranks raise at the same point, so that they can leave in good order, and one speaks."""

    exit_code = 2


class Stopped(SharedError):
    """Training stopped on request after a checkpoint; the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL: job scripts requeue on it


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> object: ...


class Communicator:
    """A process that runs alone, and the interface of those that do not."""

    name = "local"
    sums_bfloat16 = True  # whether `start_sum_` takes bfloat16
    sums_in_graphs = False  # whether it can be part of a CUDA graph

    def __init__(self, launch: Launch) -> None:
        self.rank, self.size, self.local_rank = launch.rank, launch.size, launch.local_rank
        self.launch = launch

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that speaks and writes files."""
        return self.rank == 0

    def start_sum_(self, tensor: torch.Tensor, name: str) -> Handle:
        """Start to replace `tensor` (1-D, contiguous) by its sum over all ranks; `name` is the same everywhere."""
        return _Done()

    def sum_(self, tensor: torch.Tensor, name: str = "sum") -> torch.Tensor:
        """Sum over all ranks, in place, at once: for small tensors such as metrics. Returns `tensor`."""
        self.start_sum_(tensor, name).wait()
        return tensor

    def swap(self, tensor: torch.Tensor, received: torch.Tensor, peer: int, name: str) -> None:
        """Send `tensor` to the rank `peer`, and fill `received` with what it sends: both 1-D, contiguous, of any sizes
        that fit the peer's. All ranks call it at once, in pairs, with one `name`."""
        raise AssertionError("a process that runs alone has no peer")

    def broadcast_(self, tensor: torch.Tensor, name: str = "broadcast", root: int = 0) -> None:
        """Replace `tensor` by that of rank `root`."""

    def gather(self, array: np.ndarray, name: str = "gather") -> np.ndarray:
        """Rows of all ranks, in rank order, on every rank. Shape (n, …) in, the same n everywhere; (size·n, …) out."""
        return array

    def exchange(self, value: Any) -> list[Any]:
        """The (small, picklable) value of each rank, in rank order, on every rank."""
        return [value]

    def close(self) -> None:
        """Leave in good order: all ranks call it."""

    def abort(self, code: int) -> None:
        """End this process at once, so that the launcher ends the others: none is left waiting in a collective."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block whose UserError on one rank becomes a SharedError on all: they stop together.

        The block must hold no collective of its own.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as found:
            error = found
        said = self.exchange(None if error is None else str(error))
        messages = sorted({text for text in said if text is not None})
        if messages:
            ranks = [rank for rank, text in enumerate(said) if text is not None]
            where = "" if len(ranks) == self.size else f" (on rank {', '.join(map(str, ranks))} of {self.size})"
            raise SharedError("; ".join(messages) + where) from error


class _Done:
    def wait(self) -> None:
        return None
