"""The compiled operators of the optimizers in `torch.ops.boosterbit`: their tables, and an eager oracle.

    agc_sgd_(param, grad, momentum, units, classes, lr, hyper, *, grad_scale, found_inf, copy, clipped)
    agc_sgd_list_(params, grads, momenta, units, classes, lr, hyper, *, grad_scale, found_inf, copies, clipped)
    agc_adamw_(param, grad, exp_avg, exp_avg_sq, units, classes, lr, hyper, step, *, ema, …)
    agc_adamw_list_(params, grads, exp_avgs, exp_avg_sqs, units, classes, lr, hyper, step, *, emas, …)

One call is one step of all units in the table. `param` and what an optimizer keeps of each are float32, `grad` and
`copy` float32, float16 or bfloat16; each is dense in memory, and all have the same layout. Elements are numbered by
their place in memory, so a row of a channels-last weight is as contiguous as any. `lr` is float32, one value or one per
row of `hyper`. `grad_scale` and `found_inf` are what `torch.amp.GradScaler` hands to fused optimizers: one float32
each, on the device; gradients are divided by the one, and nothing at all is written where the other is not zero. `copy`
gets the new parameters in its own dtype. `clipped`, int32, has a counter for each unit, which is one more after a step
that clipped it, and one for the steps. `step`, one float32 on the device, counts AdamW's steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import compiled
from loaders.errors import UserError

HYPER_COLUMNS = ("momentum", "weight_decay", "clipping", "eps", "nesterov", "standardize_eps")
"""Columns of the float32 `hyper` table; a negative clipping or standardize_eps means none."""
FREE_LENGTH = 4096
"""Elements of a unit where norms do not matter: any cut is right, and this one spreads well over a device."""


@dataclass(frozen=True)
class Region:
    """A parameter's place among the tensors of a call."""

    shape: Sequence[int]
    offset: int
    """Elements before it in its tensor."""
    hyper: int
    """Its row of the hyper table."""
    tensor: int = 0
    """Which tensor of the call it lies in; 0 for flat storage."""
    free: bool = False
    """Neither clipped nor standardized: its units need not be its rows."""


@dataclass(frozen=True)
class UnitTable:
    """The units of a call."""

    units: Tensor
    """(U, 4) int64: offset, length, row of the hyper table, tensor. The longest first."""
    classes: list[int]
    """Units in each size class of csrc/agc/rows.h, the longest first; their sum is U."""
    owners: Tensor
    """(U,) int64: which region each unit is of."""

    def to(self, device: torch.device) -> UnitTable:
        """The table on a device. The host does not wait."""
        return UnitTable(to_device(self.units, device), self.classes, to_device(self.owners, device))


def require(device: torch.device, operator: str = "agc_sgd_") -> None:
    """UserError that says how to build the extension, where it is missing or has no kernel for `device`."""
    if not compiled.loaded():
        raise UserError(
            f"the fused optimizer is not built; build it with {compiled.HOW_TO_BUILD}, or choose foreach or auto"
        )
    if not compiled.supports(device, operator):
        raise UserError(
            f"the fused optimizer is built without a kernel for {device.type}; with a CUDA toolkit (nvcc) at "
            f"hand build it again: BOOSTERBIT_CUDA=1 {compiled.HOW_TO_BUILD}, or choose foreach or auto"
        )


def has_contiguous_rows(tensor: Tensor) -> bool:
    """Whether `tensor` is dense and each `tensor[i]` one piece of memory, as for contiguous and channels-last."""
    if tensor.numel() == 0 or tensor.ndim == 0:
        return True
    dense = torch.ops.aten.is_non_overlapping_and_dense(tensor)
    return dense and (tensor.ndim == 1 or len(tensor) == 1 or tensor.stride(0) == tensor.numel() // len(tensor))


def unit_table(regions: Iterable[Region]) -> UnitTable:
    """The units of `regions`, on the CPU: output rows (`p[i]`) for 2 or more dimensions, the whole for fewer.

    Empty parameters have none. ValueError for a region that starts before its tensor.
    """
    regions, parts = list(regions), []
    for region in regions:
        if region.offset < 0 or region.hyper < 0 or region.tensor < 0:
            raise ValueError(f"{region}: offset, hyper and tensor must be 0 or more")
        numel = int(np.prod(region.shape, dtype=np.int64))
        if numel == 0:
            continue
        if region.free:
            starts = np.arange(0, numel, FREE_LENGTH)
            lengths = np.minimum(FREE_LENGTH, numel - starts)
        else:
            rows = region.shape[0] if len(region.shape) > 1 else 1
            lengths = np.full(rows, numel // rows)
            starts = np.arange(rows) * lengths
        part = np.empty((len(starts), 4), dtype=np.int64)
        part[:, 0], part[:, 1], part[:, 2], part[:, 3] = region.offset + starts, lengths, region.hyper, region.tensor
        parts.append(part)
    units = torch.from_numpy(np.concatenate(parts) if parts else np.empty((0, 4), dtype=np.int64))
    classes = torch.ops.boosterbit.sort_units_(units)
    return UnitTable(units, classes, _owners(regions, units))


def _owners(regions: Sequence[Region], units: Tensor) -> Tensor:
    """The region of each unit: the last of its tensor that begins at it or before."""
    found = torch.zeros(len(units), dtype=torch.int64)
    full = [index for index, region in enumerate(regions) if np.prod(region.shape, dtype=np.int64)]
    ordered = sorted(full, key=lambda index: (regions[index].tensor, regions[index].offset))
    begins = np.array([(regions[index].tensor, regions[index].offset) for index in ordered], dtype=np.int64)
    table = units.numpy()
    if len(table):
        after = np.int64(table[:, 0].max() + 1)  # more than any offset: places in all tensors, one after another
        places = table[:, 3] * after + table[:, 0]
        at = np.searchsorted(begins[:, 0] * after + begins[:, 1], places, side="right") - 1
        found = torch.from_numpy(np.array(ordered, dtype=np.int64)[at])
    return found


def hyper_row(settings: Mapping[str, Any], standardize_eps: float | None = None) -> tuple[float, ...]:
    """A row of the hyper table from the settings of a parameter group."""
    clipping = settings["clipping"]
    return (
        float(settings["momentum"]),
        float(settings["weight_decay"]),
        -1.0 if clipping is None else float(clipping),
        float(settings["eps"]),
        float(settings["nesterov"]),
        -1.0 if standardize_eps is None else float(standardize_eps),
    )


def adamw_row(settings: Mapping[str, Any], standardize_eps: float | None = None) -> tuple[float, ...]:
    """A row of AdamW's hyper table from the settings of a parameter group."""
    clipping, decay = settings["clipping"], settings["ema_decay"]
    beta1, beta2 = settings["betas"]
    return (
        1.0 - beta1,
        1.0 - beta2,
        float(settings["weight_decay"]),
        -1.0 if clipping is None else float(clipping),
        float(settings["clip_eps"]),
        float(settings["eps"]),
        0.0 if decay is None else 1.0 - decay,
        -1.0 if standardize_eps is None else float(standardize_eps),
    )


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A host table on a device, without the host waiting for it."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


def eager_step(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor,
    *,
    lr: float,
    hyper: Sequence[float],
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operators compute for one parameter, in float64: new parameter, momentum, and copy.

    `hyper`: a row as from `hyper_row`. The copy is the new parameter, or with a standardize_eps of 0 or more its
    standardized rows; `grad` is then the gradient of such rows. Written for clearness, the oracle of the tests.
    """
    decay, weight_decay, clipping, eps, nesterov, standardize_eps = hyper
    p, m, g = param.double(), momentum.double(), grad.double() / grad_scale
    g = _clipped(p, g, clipping, eps, standardize_eps)
    g = g + weight_decay * p
    m = decay * m + g
    p = p - lr * (g + decay * m if nesterov else m)
    return p, m, eager_standardize(p, standardize_eps) if standardize_eps >= 0 else p


def _clipped(p: Tensor, g: Tensor, clipping: float, eps: float, standardize_eps: float) -> Tensor:
    if standardize_eps >= 0:
        raw = p.clone().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(eager_standardize(raw, standardize_eps), raw, g)
    if clipping >= 0:
        dims = tuple(range(1, p.ndim)) if p.ndim > 1 else None
        # vector_norm scales nothing: in double, squares of 1e30 are no matter.
        limit = clipping * torch.linalg.vector_norm(p, dim=dims, keepdim=p.ndim > 1).clamp(min=eps)
        norm = torch.linalg.vector_norm(g, dim=dims, keepdim=p.ndim > 1)
        g = torch.where(norm > limit, g * (limit / norm.clamp(min=1e-6)), g)
    return g


def eager_adamw_step(
    param: Tensor,
    grad: Tensor,
    states: Sequence[Tensor],
    settings: Mapping[str, Any],
    *,
    step: int,
    standardize_eps: float = -1.0,
    grad_scale: float = 1.0,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """As `eager_step`, of AdamW: new parameter, states (exp_avg, exp_avg_sq, ema), and copy.

    `settings`: of the parameter group, with its `lr`; `step`: the number of this one, from 1.
    """
    clipping, (beta1, beta2), lr = settings["clipping"], settings["betas"], settings["lr"]
    p, (m, v, ema) = param.double(), (state.double() for state in states)
    limit = -1.0 if clipping is None else clipping
    g = _clipped(p, grad.double() / grad_scale, limit, settings["clip_eps"], standardize_eps)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g.square()
    descent = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + settings["eps"])
    p = p - lr * settings["weight_decay"] * p - lr * descent
    decay = settings["ema_decay"] or 0.0
    ema = decay * ema + (1 - decay) * p
    return p, [m, v, ema], eager_standardize(p, standardize_eps) if standardize_eps >= 0 else p


def eager_standardize(weight: Tensor, eps: float) -> Tensor:
    """Each `weight[i]` with mean 0 and biased variance 1, as arXiv 1903.10520 equation 10 writes it."""
    dims = tuple(range(1, weight.ndim))
    centred = weight - weight.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
