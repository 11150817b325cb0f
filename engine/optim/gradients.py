"""Gradients on their way: from autograd into one buffer, and summed over the ranks slice by slice during backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.comm.communicator import Communicator, Handle
from engine.optim.flat import FlatParameters
from loaders.errors import UserError

TRAVEL = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Slice:
    """Neighbours in the buffer that travel together."""

    begin: int
    end: int
    members: tuple[int, ...]  # indices of the parameters in it


def slices(flat: FlatParameters, slice_bytes: int) -> list[Slice]:
    """The buffer, `sums` behind it included, in parts of `slice_bytes` of float32 or a little more."""
    found, begin, members = [], 0, []
    for index in range(len(flat.slots)):
        members.append(index)
        last = index == len(flat.slots) - 1
        end = len(flat.grads_and_sums) if last else flat.slots[index + 1].offset
        if last or (end - begin) * flat.grads.element_size() >= slice_bytes:
            found.append(Slice(begin, end, tuple(members)))
            begin, members = end, []
    return found


class GradientSum:
    """Writes the gradients of each backward pass into `flat`'s buffer, and sums them over the ranks after the last.

    Autograd hands over each gradient as it made it, perhaps in half precision. When those of a slice are all there,
    one call stores them (first micro-batch of a step) or adds them: nothing is set to zero, and no gradient is cast by
    itself. Of the last micro-batch, a complete slice travels, in place, while the rest is still being computed.

    slice_bytes: about how much travels at once: large enough for bandwidth, small enough to begin early.
    travel: float32, or bfloat16, which halves what travels. Each rank's gradients and each partial sum are then
    rounded to 8 bits: with R ranks the error of a sum is at most R 2^-8 of the sum of the gradients' magnitudes.
    UserError where the communicator sums none of these.
    """

    def __init__(
        self, flat: FlatParameters, comm: Communicator, slice_bytes: int, travel: torch.dtype = torch.float32
    ) -> None:
        if travel == torch.bfloat16 and not comm.sums_bfloat16:
            raise UserError(f"comm.gradients=bf16: {comm.name} sums no bfloat16; choose comm.backend=torch, or fp32")
        self._flat, self._comm = flat, comm
        self._slices = slices(flat, slice_bytes)
        self._halves = None if travel == torch.float32 else torch.zeros_like(flat.grads, dtype=travel)
        self._missing: list[int] = []  # per slice: gradients not yet there in this backward pass
        self._handles: list[Handle] = []
        self._active = self._first = self._last = False
        for number, part in enumerate(self._slices):
            for member in part.members:
                flat.leaves[member].register_post_accumulate_grad_hook(self._hook(number))

    def _hook(self, number: int) -> Callable[[torch.Tensor], None]:
        def arrived(_: torch.Tensor) -> None:
            if not self._active:
                return
            self._missing[number] -= 1
            if self._missing[number] == 0:
                self._complete(number)

        return arrived

    def start(self, *, first: bool) -> None:
        """Called before the forward pass of a micro-batch, which adds to `flat.sums`; `first`: of its step."""
        if first:
            self._flat.sums.zero_()

    @contextmanager
    def during_backward(self, *, first: bool = True, last: bool = True) -> Iterator[None]:
        """Encloses the backward pass of a micro-batch: the first of its step, the last, both or neither.

        On leaving it after the last one, the gradients are sums over micro-batches and ranks.
        """
        self._first, self._last = first, last
        self._missing = [len(part.members) for part in self._slices]
        self._handles.clear()
        self._flat.detach()
        self._active = True
        yield
        self._active = False
        for number, missing in enumerate(self._missing):
            if missing:  # a parameter took no part in this pass
                self._complete(number)
        self._flat.attach()
        for handle in self._handles:
            handle.wait()
        if self._handles and self._halves is not None:
            self._flat.grads.copy_(self._halves)

    @torch.no_grad()
    def _complete(self, number: int) -> None:
        places, given = [], []
        for index in self._slices[number].members:
            place, leaf = self._flat.places[index], self._flat.leaves[index]
            if leaf.grad is not None:
                places.append(place)
                given.append(leaf.grad)
                leaf.grad = None
            elif self._first:
                place.zero_()
        if given and self._first:
            torch._foreach_copy_(places, given)
        elif given:
            torch._foreach_add_(places, given)
        if self._last and self._comm.size > 1:
            self._send(number)

    def _send(self, number: int) -> None:
        # Slices start in the order in which they become ready, which is the same on all ranks: the graph is.
        flat, part = self._flat, self._slices[number]
        if self._halves is None:
            travelling = flat.grads_and_sums[part.begin : part.end]
        else:
            whole = slice(part.begin, min(part.end, len(self._halves)))
            travelling = self._halves[whole].copy_(flat.grads[whole])
            if part.end > len(self._halves):  # the number of labels needs more than 8 bits
                self._handles.append(self._comm.start_sum_(flat.sums, "sums"))
        self._handles.append(self._comm.start_sum_(travelling, f"gradients.{number}"))
