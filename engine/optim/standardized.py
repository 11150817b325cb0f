"""Weight standardization in the optimizer: the forward pass reads kernels that the last step left standardized.

A kernel w with standardized rows s(w) enters the network as s(w) only. Its gradient is J(w)ᵀ g, with g the gradient of
s(w) and J the derivative of s. J is linear in g, and so commutes with sums over micro-batches and ranks: g may be
accumulated and all-reduced, and the optimizer, which has the rows at hand anyway, multiplies by J once a step. It then
updates w, and writes s(w) for the next forward pass. The parameters of the network, and so its checkpoints, stay w.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine import compiled
from engine.network.bit import STD_EPS, StdConv2d
from engine.optim import ops
from engine.optim.flat import FlatParameters
from engine.optim.fused import ForwardWeights
from engine.optim.span import zeros
from loaders.errors import UserError


class StandardizedWeights:
    """Gives the kernels of `model` standardized copies, in `dtype`, for its forward pass to read.

    From then on `GradientSum` leaves the gradients of these in `flat.grads`, at the places of the kernels, for an
    `AgcSgd` that has `forward_weights`. Whoever else changes parameters calls `refresh`; loading a state dict into the
    model does so by itself.
    """

    def __init__(self, model: nn.Module, flat: FlatParameters, dtype: torch.dtype) -> None:
        device = flat.values.device
        ops.require(device)
        self._values, self._copies = flat.values, zeros(len(flat.values), device, dtype)
        convolutions = {module.weight: module for module in model.modules() if isinstance(module, StdConv2d)}
        copies: dict[Tensor, Tensor] = {}
        regions = []
        for index, (slot, parameter) in enumerate(zip(flat.slots, flat.parameters, strict=True)):
            copy = flat.view(self._copies, slot, channels_last=flat.channels_last)
            copies[parameter] = copy
            regions.append(ops.Region(slot.shape, slot.offset, int(parameter in convolutions)))
            if parameter in convolutions:
                leaf = copy.detach().requires_grad_()
                convolutions[parameter].standardized = flat.leaves[index] = leaf
        self.forward_weights = ForwardWeights(copies, frozenset(convolutions), STD_EPS)
        self._units = ops.unit_table(regions).to(device)
        neutral = {"momentum": 0.0, "weight_decay": 0.0, "clipping": None, "eps": 0.0, "nesterov": False}
        rows = [ops.hyper_row(neutral), ops.hyper_row(neutral, STD_EPS)]
        self._hyper = ops.to_device(torch.tensor(rows), device)
        self.refresh()
        model.register_load_state_dict_post_hook(lambda *_: self.refresh())

    def refresh(self) -> None:
        """Derive the copies from the parameters, to the bit as a step does."""
        units = self._units
        torch.ops.boosterbit.write_copy_(self._values, self._copies, units.units, units.classes, self._hyper)


def choose(
    model: nn.Module,
    flat: FlatParameters,
    dtype: torch.dtype,
    standardize: str = "auto",
    implementation: str = "auto",
) -> StandardizedWeights | None:
    """Standardized weights for a fused optimizer, or None where the network is to standardize, or does not; settings as
    in `AgcSgdConfig`. UserError for `standardize` "optimizer" where the extension is not built, or there is nothing to
    standardize."""
    if not any(isinstance(module, StdConv2d) for module in model.modules()):
        if standardize == "optimizer":
            raise UserError("optim.standardize=optimizer: this network standardizes no weights; leave it away")
        return None
    fused = implementation != "foreach" and compiled.supports(flat.values.device, "agc_sgd_")
    if standardize == "optimizer" or (standardize == "auto" and fused):
        return StandardizedWeights(model, flat, dtype)
    return None
