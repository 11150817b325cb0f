"""What fused optimizers hand to their operators beside parameters and gradients: settings, rates, copies to write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.optim import ops

Groups = Sequence[Mapping[str, Any]]
"""Of parameters, as an optimizer has them."""


@dataclass(frozen=True)
class Rule:
    """What tells one optimizer's operators from another's."""

    operator: str
    """Its name in `torch.ops.boosterbit`; that for lists ends in `list_`."""
    states: tuple[str, ...]
    """What it keeps of each parameter, in the operator's order, as the optimizer's state names it."""
    max_tensors: int
    """Separate tensors in one call, as in csrc/."""
    hyper_row: Callable[[Mapping[str, Any], float | None], tuple[float, ...]]
    counts_steps: bool = False
    """Whether the state has a `step`, which the operator counts."""
    average: str = ""
    """The state that begins as the parameter itself, in groups that have a decay of that name; empty: there is none."""

    def kind(self, group: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        """What of a group's settings decides on units, state and calls: is it clipped, kept, averaged?"""
        averages = bool(self.average) and group[f"{self.average}_decay"] is not None
        return group["clipping"] is not None, group.get("momentum") != 0, averages


@dataclass(frozen=True)
class ForwardWeights:
    """What the forward pass reads in the place of parameters, written anew by each step."""

    copies: Mapping[Tensor, Tensor]
    """Parameter → its copy, of the same shape and layout, float32, float16 or bfloat16."""
    standardized: frozenset[Tensor] = frozenset()
    """Parameters whose copies have standardized rows, and whose gradients are those of such rows."""
    eps: float = 0.0
    """Added to the variance of a row."""


def problem_with(params: Sequence[Tensor]) -> str | None:
    """Why the operator does not take these parameters, None if it does."""
    devices = sorted({str(p.device) for p in params})
    if len(devices) != 1:
        return f"parameters lie on {', '.join(devices) or 'no device'}; one device expected"
    for p in params:
        if p.dtype != torch.float32:
            return f"a parameter is {p.dtype}; float32 expected"
        if not ops.has_contiguous_rows(p):
            return (
                f"a parameter of shape {tuple(p.shape)} has strides {p.stride()}; each of its rows must lie in one "
                "piece of memory, as in contiguous and channels-last ones"
            )
    return None


class Tables:
    """Settings and learning rates of parameter groups on a device, for each group two rows: one for its plain
    parameters, and one for the standardized. They are written again when they change, and no host waits."""

    def __init__(self, rule: Rule, device: torch.device) -> None:
        self.device, self._rule = device, rule
        self._rows: tuple | None = None
        self._rates: list[float] = []
        self._hyper = self._lr = torch.empty(0)

    def current(self, groups: Groups, weights: ForwardWeights | None) -> tuple[Tensor, Tensor]:
        """lr (1 or a value for each row) and hyper (rows, columns of the rule), both float32."""
        eps = None if weights is None else weights.eps
        rows = tuple(self._rule.hyper_row(group, value) for group in groups for value in (None, eps))
        if rows != self._rows:
            self._hyper, self._rows = ops.to_device(torch.tensor(rows), self.device), rows
        return self._learning_rates([group["lr"] for group in groups]), self._hyper

    def _learning_rates(self, given: list[float | Tensor]) -> Tensor:
        # A tensor on the host can be read at once; one on the device must stay there.
        rates: list[Any] = [float(r) if isinstance(r, Tensor) and r.device.type == "cpu" else r for r in given]
        if any(isinstance(rate, Tensor) for rate in rates):
            if all(rate is rates[0] for rate in rates):
                return rates[0].detach().reshape(1).float()
            rows = [r.reshape(()) if isinstance(r, Tensor) else torch.full((), r, device=self.device) for r in rates]
            return torch.stack([row.float() for row in rows for _ in range(2)])
        wanted = rates[:1] if len(set(rates)) == 1 else [rate for rate in rates for _ in range(2)]
        if len(wanted) != len(self._rates):
            self._lr, self._rates = torch.zeros(len(wanted), device=self.device), [0.0] * len(wanted)
        for index, (old, new) in enumerate(zip(self._rates, wanted, strict=True)):
            if old != new:
                self._lr[index].fill_(new)  # a kernel with the number as its argument: no copy from the host
        self._rates = wanted
        return self._lr
