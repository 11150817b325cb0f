"""Parameters and gradients of a network in two contiguous buffers.

Both have the same layout, in reverse order of registration: the head comes first, since its gradient is ready first.
So a slice of the gradient buffer is complete when the backward pass has come that far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine.optim.span import zeros

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
    either way the row of one output is contiguous. `slots` say where each of `parameters` lies, `places` are their
    parts of `grads`. Behind the gradients lie two elements more, `sums`, which are summed along with them: `count`, the
    number of labels that the loss was summed over, and `loss`, that sum. `leaves` are the tensors whose gradients
    autograd delivers: the parameters, unless the network reads other tensors in their place.
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
        self.values = zeros(end, device)
        self.grads_and_sums = zeros(end + ALIGNMENT, device)
        self.grads, self.sums = self.grads_and_sums[:end], self.grads_and_sums[end : end + 2]
        self.count, self.loss = self.sums[:1], self.sums[1:]
        self.places = [self.view(self.grads, slot, channels_last=channels_last) for slot in self.slots]
        with torch.no_grad():
            for slot, parameter in zip(self.slots, self.parameters, strict=True):
                value = self.view(self.values, slot, channels_last=channels_last)
                value.copy_(parameter)
                parameter.data = value
        self.leaves: list[torch.Tensor] = list(self.parameters)
        self.attach()

    def attach(self) -> None:
        """Each parameter's gradient is its place in the buffer, as optimizers want it."""
        for parameter, place in zip(self.parameters, self.places, strict=True):
            parameter.grad = place

    def detach(self) -> None:
        """No leaf has a gradient, so that autograd hands over each as it made it, in its own dtype."""
        for leaf in self.leaves:
            leaf.grad = None

    @staticmethod
    def view(buffer: torch.Tensor, slot: Slot, *, channels_last: bool) -> torch.Tensor:
        """The slot's part of `buffer` in the parameter's shape."""
        flat = buffer[slot.offset : slot.offset + slot.numel]
        if channels_last and len(slot.shape) == 4:
            o, i, h, w = slot.shape
            return flat.view(o, h, w, i).permute(0, 3, 1, 2)
        return flat.view(slot.shape)
