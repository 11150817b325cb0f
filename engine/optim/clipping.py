"""Adaptive gradient clipping (AGC) in plain torch, and how many rows are clipped: counted by the operators as they
write a row, added up when somebody asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.optim.ops import to_device

TINY_NORM = 1e-6
"""Gradient norms below this count as this in the quotient, as in the published AGC code."""


def adaptive_clip(params: Sequence[Tensor], grads: Sequence[Tensor], clipping: float, eps: float) -> list[Tensor]:
    """The gradients, each unit scaled down to a norm of `clipping * max(norm of its parameters, eps)` at
    most.

    A unit is an output row (`p[i]`) of a parameter with 2 or more dimensions, and the whole of one with
    fewer. The quotient is `max_norm / max(grad_norm, 1e-6)`, used only where `grad_norm > max_norm`. Norms
    are in fp32 at least: a gradient row with a norm over 1.8e19 counts as infinite and becomes zero. Returns
    new tensors, in the gradients' dtypes. arXiv 2102.06171, equation 3, with the details of its published
    code.
    """
    return adaptive_clip_counted(params, grads, clipping, eps)[0] if grads else []


def adaptive_clip_counted(
    params: Sequence[Tensor], grads: Sequence[Tensor], clipping: float, eps: float
) -> tuple[list[Tensor], Tensor]:
    """`adaptive_clip` of one gradient at least, and how many units of each were scaled down, (params,) int64."""
    param_norms = [_unit_norm(p) for p in params]
    grad_norms = [_unit_norm(g) for g in grads]
    limits = torch._foreach_mul(torch._foreach_maximum(param_norms, eps), clipping)
    quotients = torch._foreach_div(limits, torch._foreach_maximum(grad_norms, TINY_NORM))
    # `where` and not a minimum with 1: below TINY_NORM the quotient is not the test.
    over = [norm > limit for norm, limit in zip(grad_norms, limits, strict=True)]
    scales = [torch.where(more, quotient, 1.0) for more, quotient in zip(over, quotients, strict=True)]
    clipped = [(g * scale).to(g.dtype) for g, scale in zip(grads, scales, strict=True)]
    return clipped, torch.stack([more.sum() for more in over])


def adaptive_clip_(params: Sequence[Tensor], grads: Sequence[Tensor], clipping: float, eps: float) -> None:
    """`adaptive_clip` in place."""
    for g, clipped in zip(grads, adaptive_clip(params, grads, clipping, eps), strict=True):
        g.copy_(clipped)


def _unit_norm(x: Tensor) -> Tensor:
    """(o, ...) → (o, 1, ...), and 0-D or 1-D → 0-D: the units' 2-norms."""
    dims = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    return torch.linalg.vector_norm(x, dim=dims, keepdim=x.ndim > 1, dtype=wide(x.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Clipped(NamedTuple):
    """Of a parameter or layer, over some steps."""

    clipped: int
    """Rows whose gradient was scaled down."""
    rows: int
    """All rows, once for each step."""

    @property
    def share(self) -> float:
        return self.clipped / self.rows if self.rows else 0.0


def total(counted: Iterable[Clipped]) -> Clipped:
    """The sum of several."""
    pairs = list(counted)
    return Clipped(sum(each.clipped for each in pairs), sum(each.rows for each in pairs))


def by_layer(counted: Mapping[str, Clipped]) -> dict[str, Clipped]:
    """Of each module, from what is counted of its own parameters, by their names."""
    layers: dict[str, list[Clipped]] = {}
    for name, each in counted.items():
        layers.setdefault(name.rpartition(".")[0] or name, []).append(each)
    return {layer: total(several) for layer, several in layers.items()}


class LoggedShares:
    """What a run logs: `clipped`, the share of rows that were clipped since the last reading, and `clipped/LAYER` of
    each layer that ever had one: of most there is nothing to say. Equal on all ranks, so that one may ask."""

    def __init__(self) -> None:
        self._layers: set[str] = set()

    def of(self, counted: Mapping[str, Clipped]) -> dict[str, float]:
        layers = by_layer(counted)
        self._layers |= {layer for layer, each in layers.items() if each.clipped}
        shares = {f"clipped/{layer}": each.share for layer, each in layers.items() if layer in self._layers}
        return {"clipped": total(layers.values()).share} | shares if layers else {}


@dataclass(frozen=True)
class Tally:
    """What a call of an operator counts."""

    params: Sequence[Tensor]
    counters: Tensor
    """(units + 1,) int32: how often each unit was clipped, and the steps."""
    owners: Tensor
    """(units,) int64: which of `params` each unit is of."""
    rows: Tensor
    """(params,) int64: rows of each that clipping looks at; 0 where its group is not clipped."""

    @classmethod
    def of(cls, params: Sequence[Tensor], clips: Sequence[bool], owners: Tensor) -> Tally:
        """With new counters; `owners` on the parameters' device. The host does not wait for it."""
        device = params[0].device
        rows = [_rows(p) if clip else 0 for p, clip in zip(params, clips, strict=True)]
        of_each = torch.stack([torch.full((), number, device=device) for number in rows])
        return cls(params, torch.zeros(len(owners) + 1, dtype=torch.int32, device=device), owners, of_each)

    @classmethod
    def of_sums(cls, params: Sequence[Tensor]) -> Tally:
        """Of parameters that are clipped, whose counts come as sums: see `add`."""
        return cls.of(params, [True] * len(params), torch.arange(len(params), device=params[0].device))

    def add(self, clipped: Tensor) -> None:
        """A step that clipped so many rows of each parameter."""
        self.counters[:-1] += clipped
        self.counters[-1:] += 1


class Counts:
    """Sums over steps, on the device, so that counting waits for nothing; `take` does."""

    def __init__(self) -> None:
        self._places: dict[Tensor, int] = {}
        self._sums = torch.zeros(2, 0, dtype=torch.int64)  # of each parameter: rows clipped, rows

    def collect(self, tally: Tally) -> None:
        """Add what a call has counted since this was last done; its counters are 0 then."""
        clipped = torch.zeros_like(tally.rows).index_add_(0, tally.owners, tally.counters[:-1].long())
        self.add(tally.params, clipped, tally.rows * tally.counters[-1])
        tally.counters.zero_()

    def add(self, params: Sequence[Tensor], clipped: Tensor, rows: Tensor) -> None:
        """Add counts of parameters, (params,) int64 each."""
        new = [p for p in params if p not in self._places]
        self._places |= {p: place for place, p in enumerate(new, len(self._places))}
        more = torch.zeros(2, len(new), dtype=torch.int64, device=clipped.device)
        self._sums = torch.cat([self._sums.to(clipped.device), more], dim=1)
        places = to_device(torch.tensor([self._places[p] for p in params], dtype=torch.int64), clipped.device)
        self._sums.index_add_(1, places, torch.stack([clipped, rows]))

    def take(self) -> dict[Tensor, Clipped]:
        """The sums of each parameter that was looked at, which begin anew. Waits for the device."""
        clipped, rows = self._sums.tolist()
        self._sums = torch.zeros_like(self._sums)
        return {p: Clipped(clipped[at], rows[at]) for p, at in self._places.items() if rows[at]}


def _rows(param: Tensor) -> int:
    """Units that clipping sees: the output rows of 2 and more dimensions, one of fewer."""
    return 0 if not param.numel() else len(param) if param.ndim > 1 else 1
