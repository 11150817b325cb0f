"""The network of a name: a member of the BiT family, or as `timm/NAME` one of timm's, any that has a classifier."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from engine.network import bit, family
from engine.network.naming import HEAD
from loaders.errors import UserError


def build(name: str, num_classes: int, size: int, *, zero_head: bool = True, recompute: str = "none") -> nn.Module:
    """The network, freshly initialized, on the CPU: images (b, 3, size, size) → logits (b, num_classes).

    `zero_head` starts the classifier at zero; otherwise it has the default of PyTorch, or of timm. `recompute`: one of
    `engine.network.recompute.RECOMPUTE`. UserError: an unknown name, no classes, a network without one classifier, one
    that does not take such images, or one of timm's that should recompute.
    """
    if not family.is_timm(name):
        return bit.build(name, num_classes, zero_head=zero_head, recompute=recompute)
    if recompute != "none":
        raise UserError(f"recompute={recompute} is for networks of the BiT family, not for {name}; leave it away")
    timm, plain = family.timm_model(name)
    model = cast(nn.Module, timm.create_model(plain, num_classes=num_classes))
    named = _configuration(model).get("classifier")
    if not isinstance(named, str) or not any(True for _ in model.get_submodule(named).parameters()):
        raise UserError(f"{name} has no single classifier that could be exchanged (it names {named!r}); take another")
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} does not take images of {size} pixels a side ({said}); set data.size") from error
    if logits.shape != (1, num_classes):
        raise UserError(f"{name} gives {tuple(logits.shape)} for an image, not {num_classes} logits; take another")
    if zero_head:
        for parameter in model.get_submodule(named).parameters():
            nn.init.zeros_(parameter)
    return model.train()


def head(model: nn.Module) -> str:
    """The name of the module that is the classifier, as in `named_parameters`."""
    return HEAD.removesuffix(".") if isinstance(model, bit.Bit) else _configuration(model)["classifier"]


def _configuration(model: nn.Module) -> dict[str, Any]:
    """What timm says of one of its networks."""
    return cast(dict[str, Any], model.pretrained_cfg)
