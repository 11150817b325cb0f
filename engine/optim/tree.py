"""Gradients summed in one tree, whatever the number of ranks: the sum's bits do not depend on it.

A step's micro-batches are the leaves, in their order. A node's children are the two halves of its leaves, the first the
smaller one where they are odd in number. A rank has neighbours that are all the leaves of one node, and sums them as
they come; what is above them, the ranks sum by exchange. Which of two ranks adds does not matter: a + b = b + a.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.comm.communicator import Communicator
from engine.optim.flat import FlatParameters
from engine.optim.gradients import GradientSum
from loaders.errors import UserError


def merges(leaves: int) -> list[int]:
    """How many nodes are complete with each leaf, besides itself, when they come in order: 5 leaves → 0 1 0 0 3.

    So often the newest sum is added to the one before it, which then is gone.
    """
    if leaves == 1:
        return [0]
    found = merges(leaves // 2) + merges(leaves - leaves // 2)
    found[-1] += 1
    return found


def waiting(leaves: int) -> int:
    """How many sums wait at most for the rest of their node."""
    return (leaves - 1).bit_length()


def check_ranks(leaves: int, ranks: int) -> None:
    """UserError unless as many ranks each have the leaves of one node: a power of two that divides their number."""
    possible = [2**k for k in range(leaves.bit_length()) if leaves % 2**k == 0]
    if ranks not in possible:
        raise UserError(
            f"reproducible=true: {leaves} micro-batches a step on {ranks} ranks, which must be a power of two that "
            f"divides them: {', '.join(map(str, possible))}; change the number of ranks, or the global batch"
        )


def sum_over_ranks_(tensor: torch.Tensor, spare: torch.Tensor, comm: Communicator, name: str) -> None:
    """Replace `tensor`, 1-D and contiguous, by its sum over the ranks, a power of two: neighbours first, then pairs of
    neighbours, and so on.

    Each pair halves what both have to add, and sends the other half; the sums come back the same way. So a rank sends
    and receives twice the tensor in all, however many there are. spare: of half its size, rounded up, or larger.
    """
    begin, end, way = 0, len(tensor), []
    for level in range(comm.size.bit_length() - 1):
        peer, middle = comm.rank ^ (1 << level), (begin + end) // 2
        low, high = slice(begin, middle), slice(middle, end)
        mine, theirs = (low, high) if comm.rank < peer else (high, low)
        received = spare[: mine.stop - mine.start]
        comm.swap(tensor[theirs], received, peer, f"{name}.{level}")
        tensor[mine] += received
        way.append((mine, theirs, peer))
        begin, end = mine.start, mine.stop
    for mine, theirs, peer in reversed(way):
        comm.swap(tensor[mine], tensor[theirs], peer, f"{name}.back.{peer ^ comm.rank}")


class TreeSum(GradientSum):
    """As `GradientSum`, and the sums of micro-batches and ranks make one tree over `leaves`, those of a step.

    Its price: nothing travels before the last backward pass has ended, and a buffer is kept for each level of the part
    of the tree that is this rank's. UserError where the ranks do not fit the tree, or `travel` rounds.
    """

    def __init__(
        self, flat: FlatParameters, comm: Communicator, slice_bytes: int, travel: torch.dtype, leaves: int
    ) -> None:
        check_ranks(leaves, comm.size)
        if travel != torch.float32:
            raise UserError(
                "reproducible=true with comm.gradients=bf16: sums are rounded as often as they travel, which depends "
                "on the number of ranks; choose comm.gradients=fp32"
            )
        super().__init__(flat, comm, slice_bytes, travel)
        self._merges = merges(leaves // comm.size)
        self._older: list[torch.Tensor] = []  # buffers: sums that wait for the rest of their node
        self._waiting = self._leaf = 0  # how many of them do; which micro-batch is next
        longest = max(part.end - part.begin for part in self._slices)
        self._spare = torch.empty(-(-longest // 2) if comm.size > 1 else 0, device=flat.grads.device)

    def start(self, *, first: bool) -> None:
        if first:
            self._waiting = self._leaf = 0
        super().start(first=True)

    @contextmanager
    def during_backward(self, *, first: bool = True, last: bool = True) -> Iterator[None]:
        with super().during_backward(first=True, last=False):
            yield
        newest = self._flat.grads_and_sums
        for _ in range(self._merges[self._leaf]):
            self._waiting -= 1
            newest += self._older[self._waiting]
        self._leaf += 1
        assert last == (self._leaf == len(self._merges)), "a step has as many micro-batches as the tree has leaves"
        if not last:
            self._keep(newest)
        elif self._comm.size > 1:
            for number, part in enumerate(self._slices):
                whole = newest[part.begin : part.end]
                sum_over_ranks_(whole, self._spare, self._comm, f"gradients.{number}")

    def _keep(self, newest: torch.Tensor) -> None:
        if self._waiting == len(self._older):
            self._older.append(torch.empty_like(newest))
        self._older[self._waiting].copy_(newest)
        self._waiting += 1
