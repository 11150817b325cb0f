"""Parameters and gradients of a network in two contiguous buffers, all-reduced slice by slice during backward.

Both buffers have the same layout, in reverse order of registration: the head comes first, since its gradient is
ready first. So a slice of the gradient buffer is complete when the backward pass has come that far, and it travels,
in place and without a fusion copy, while the rest is still being computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from engine.comm.communicator import Communicator, Handle

ALIGNMENT = 32  # elements: 128 bytes in fp32, one memory transaction of a GPU and a multiple of any vector width


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the buffers."""

    name: str
    offset: int  # elements from the start of the buffer
    numel: int
    shape: torch.Size


class FlatParameters:
    """Moves a network's parameters into one buffer and gives each a gradient that is a view of another.

    values, grads: 1-D float32 tensors of the same length on the network's device. The gaps between parameters are
    zero, and stay so. A 4-D weight (O, I, H, W) is stored as (O, H, W, I) where `channels_last`, else as it is:
    either way the row of one output is contiguous. `count` is one extra element at the end of the last slice, for
    the number of labels that the loss was summed over: it is summed over the ranks along with the gradients.
    `leaves` are the tensors whose gradients autograd delivers: the parameters, unless the network reads other tensors
    in their place, which then share their gradients.
    """

    def __init__(self, model: nn.Module, *, channels_last: bool) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise AssertionError("the network has no parameters to train")
        device = named[0][1].device
        self.channels_last = channels_last
        self.slots: list[Slot] = []
        self.parameters: list[nn.Parameter] = []
        end = 0
        for name, parameter in reversed(named):
            self.slots.append(Slot(name, end, parameter.numel(), parameter.shape))
            self.parameters.append(parameter)
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.values = torch.zeros(end, device=device)
        self._all = torch.zeros(end + ALIGNMENT, device=device)
        self.grads, self.count = self._all[:end], self._all[end : end + 1]
        with torch.no_grad():
            for slot, parameter in zip(self.slots, self.parameters, strict=True):
                value = self.view(self.values, slot, channels_last=channels_last)
                value.copy_(parameter)
                parameter.data = value
                parameter.grad = self.view(self.grads, slot, channels_last=channels_last)
        self.leaves: list[torch.Tensor] = list(self.parameters)

    @staticmethod
    def view(buffer: torch.Tensor, slot: Slot, *, channels_last: bool) -> torch.Tensor:
        """The slot's part of `buffer` in the parameter's shape."""
        flat = buffer[slot.offset : slot.offset + slot.numel]
        if channels_last and len(slot.shape) == 4:
            o, i, h, w = slot.shape
            return flat.view(o, h, w, i).permute(0, 3, 1, 2)
        return flat.view(slot.shape)

    def zero_grads(self) -> None:
        """Forget the gradients; each parameter keeps its view."""
        self._all.zero_()


class GradientSum:
    """Sums `flat`'s gradients over the ranks, a slice as soon as the backward pass has completed it.

    slice_bytes: about how much travels at once: large enough for bandwidth, small enough to begin early.
    """

    def __init__(self, flat: FlatParameters, comm: Communicator, slice_bytes: int) -> None:
        self._comm = comm
        self._slices: list[torch.Tensor] = []
        self._awaited: list[int] = []  # per slice: parameters in it
        self._missing: list[int] = []  # per slice: gradients not yet there in this step
        self._handles: dict[int, Handle] = {}
        self._armed = False
        if comm.size == 1:
            return
        begin, members = 0, []
        for index in range(len(flat.slots)):
            members.append(index)
            last = index == len(flat.slots) - 1
            end = len(flat._all) if last else flat.slots[index + 1].offset
            if last or (end - begin) * flat._all.element_size() >= slice_bytes:
                number = len(self._slices)
                self._slices.append(flat._all[begin:end])
                self._awaited.append(len(members))
                for member in members:
                    flat.leaves[member].register_post_accumulate_grad_hook(self._hook(number))
                begin, members = end, []

    def _hook(self, number: int) -> Callable[[torch.Tensor], None]:
        def arrived(_: torch.Tensor) -> None:
            if not self._armed:
                return
            self._missing[number] -= 1
            if self._missing[number] == 0:
                self._start(number)

        return arrived

    def _start(self, number: int) -> None:
        # Slices start in the order in which they become ready, which is the same on all ranks: the graph is.
        self._handles[number] = self._comm.start_sum_(self._slices[number], f"gradients.{number}")

    @contextmanager
    def during_backward(self, communicate: bool) -> Iterator[None]:
        """Encloses a backward pass. `communicate` is true for the last micro-batch of a step only.

        On leaving it after that one, the gradients are sums over all ranks.
        """
        self._armed = communicate
        self._missing = list(self._awaited)
        self._handles.clear()
        yield
        self._armed = False
        if communicate:
            for number in range(len(self._slices)):
                if number not in self._handles:  # a parameter that took no part in this step
                    self._start(number)
            for handle in self._handles.values():
                handle.wait()
