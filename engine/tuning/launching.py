"""How long a CPU takes to start the operations of a network, which larger micro-batches do less often."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from engine.network import bit
from engine.optim.flat import FlatParameters
from engine.optim.standardized import choose

_NETWORK, _SIDE = "R8x0.25-8px", 8  # the smallest of the family, which computes next to nothing on one image
_PASSES = 7


class Precision(Protocol):
    """How a network computes: `engine.training.precision`."""

    @property
    def device(self) -> torch.device: ...
    @property
    def compute_dtype(self) -> torch.dtype: ...
    def autocast(self) -> AbstractContextManager: ...


def launching_seconds(model: nn.Module, precision: Precision) -> float:
    """Seconds for the operations of a forward and backward pass of `model`: what a layer of the smallest network takes
    for one small image, times the layers. NaN on a GPU, which the host is ahead of, or is not: that can be seen."""
    if precision.device.type != "cpu":
        return math.nan
    with torch.random.fork_rng(devices=[]):
        small = bit.build(_NETWORK, 2, zero_head=False)
    flat, taken = FlatParameters(small, channels_last=True), []
    choose(small, flat, precision.compute_dtype, "auto", "auto")
    image = torch.zeros(1, 3, _SIDE, _SIDE)
    for _ in range(_PASSES):
        start = time.perf_counter()
        with precision.autocast():
            result = small(image)
        result.float().sum().backward()
        taken.append(time.perf_counter() - start)
    return min(taken) * _layers(model) / _layers(small)


def _layers(model: nn.Module) -> int:
    return sum(not list(module.children()) for module in model.modules())
