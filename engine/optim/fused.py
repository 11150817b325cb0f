"""A step of `AgcSgd` as one call of the operator: its arguments, made once and kept from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from engine.optim import ops
from engine.optim.span import FlatSpan, laid_out_as, same_layout
from loaders.errors import UserError

Groups = Sequence[Mapping[str, Any]]
"""Of parameters, as an optimizer has them."""

MAX_TENSORS = 960
"""Separate tensors in one call, as in csrc/agc_sgd/api.h."""


@dataclass(frozen=True)
class ForwardWeights:
    """What the forward pass reads in the place of parameters, written anew by each step."""

    copies: Mapping[Tensor, Tensor]
    """Parameter → its copy, of the same shape and layout, float32, float16 or bfloat16."""
    standardized: frozenset[Tensor] = frozenset()
    """Parameters whose copies have standardized rows, and whose gradients are those of such rows."""
    eps: float = 0.0
    """Added to the variance of a row."""


@dataclass(frozen=True)
class Member:
    """A parameter that takes part in a step."""

    param: Tensor
    group: int
    """Its parameter group."""


@dataclass(frozen=True)
class FlatCall:
    """Arguments of one operator call on buffers that hold all parameters, gradients, momenta, and copies if any."""

    params: Tensor
    grads: Tensor
    momenta: Tensor
    copies: Tensor | None
    units: ops.UnitTable

    def run(self, lr: Tensor, hyper: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        arrays = self.params, self.grads, self.momenta
        tables = self.units.units, self.units.classes, lr, hyper
        amp = {"grad_scale": grad_scale, "found_inf": found_inf}
        torch.ops.boosterbit.agc_sgd_(*arrays, *tables, **amp, copy=self.copies)


def gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter that takes part in a step, and so has one."""
    assert param.grad is not None
    return param.grad


@dataclass(frozen=True)
class ListCall:
    """Arguments of one operator call on separate tensors. Gradients are taken from the parameters at each step, so
    that they may be new ones, and the plan keeps none alive."""

    params: Sequence[Tensor]
    momenta: Sequence[Tensor]
    copies: Sequence[Tensor]
    units: ops.UnitTable

    def run(self, lr: Tensor, hyper: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        arrays = self.params, [laid_out_as(param, gradient(param)) for param in self.params], self.momenta
        tables = self.units.units, self.units.classes, lr, hyper
        amp = {"grad_scale": grad_scale, "found_inf": found_inf}
        torch.ops.boosterbit.agc_sgd_list_(*arrays, *tables, **amp, copies=self.copies)


class Plan:
    """The calls that make a step of the parameters of `groups` that have a gradient; `fits` says for how long.

    Momentum of flat parameters is put into one buffer, and `state` gets a view of it for each. The state's own values
    are kept. UserError for a gradient that the operator does not take.
    """

    def __init__(self, groups: Groups, state: Mapping[Tensor, dict], weights: ForwardWeights | None) -> None:
        self._weights = weights
        self.members = members(groups)
        self.calls: list[FlatCall | ListCall] = []
        self._momenta: dict[Tensor, Tensor] = {}
        kinds: dict[tuple, list[Member]] = {}
        for member in self.members:
            copy = None if weights is None else weights.copies.get(member.param)
            kind = _checked_dtype(gradient(member.param)), None if copy is None else copy.dtype
            kinds.setdefault(kind, []).append(member)
        for (_, copy_dtype), chosen in kinds.items():
            self._add_calls(chosen, copy_dtype is not None, groups, state)
        for member in self.members:
            if groups[member.group]["momentum"] != 0:
                state[member.param]["momentum_buffer"] = self._momenta[member.param]
        self._flat = any(isinstance(call, FlatCall) for call in self.calls)
        self._params = [p for group in groups for p in group["params"]]
        self._grads = [p.grad if self._flat or p.grad is None else p.grad.dtype for p in self._params]
        self._addresses = self._find()
        self._states = len(state)
        self._kinds = _kinds(groups)

    def _find(self) -> list[int]:
        grads = [grad for grad in self._grads if grad is not None] if self._flat else []
        return [tensor.data_ptr() for tensor in (*self._params, *grads)]

    def fits(self, groups: Groups, state: Mapping[Tensor, dict]) -> bool:
        """Whether the same parameters have gradients, at the same places as when this plan was made.

        This is most of what the host does in a step, so it looks at each tensor as little as it can.
        """
        params = [p for group in groups for p in group["params"]]
        if len(params) != len(self._params) or not all(map(is_, params, self._params)) or len(state) != self._states:
            return False
        if self._kinds != _kinds(groups):
            return False
        grads = [p.grad for p in params]
        if self._flat:
            same = all(map(is_, grads, self._grads))
        else:
            same = [grad if grad is None else grad.dtype for grad in grads] == self._grads
        return same and self._find() == self._addresses

    def run(self, lr: Tensor, hyper: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """One step, with two rows of `hyper` for each group, see `Tables`."""
        for call in self.calls:
            call.run(lr, hyper, grad_scale, found_inf)

    def _add_calls(self, chosen: Sequence[Member], copied: bool, groups: Groups, state: Mapping[Tensor, dict]) -> None:
        params = [member.param for member in chosen]
        found = [state.get(param, {}).get("momentum_buffer") for param in params]
        copies = [self._weights.copies[param] for param in params] if self._weights and copied else []
        rows = [self._row(member, groups) for member in chosen]
        device = params[0].device
        span = FlatSpan.of(params)
        grads = [param.grad for param in params]
        if span is not None and all(span.shift(tensors) is not None for tensors in (grads, copies) if tensors):
            buffer = span.momentum(found)
            self._momenta.update((param, span.view(buffer, param)) for param in params)
            regions = [
                ops.Region(param.shape, span.offset(param), row, 0, free)
                for param, (row, free) in zip(params, rows, strict=True)
            ]
            table = ops.unit_table(regions).to(device)
            arrays = span.whole(params), span.whole(grads), buffer, span.whole(copies) if copied else None
            self.calls.append(FlatCall(*arrays, table))
            return
        momenta = [_momentum(param, momentum) for param, momentum in zip(params, found, strict=True)]
        self._momenta.update(zip(params, momenta, strict=True))
        for begin in range(0, len(params), MAX_TENSORS):
            part = slice(begin, begin + MAX_TENSORS)
            regions = [
                ops.Region(param.shape, 0, row, index, free)
                for index, (param, (row, free)) in enumerate(zip(params[part], rows[part], strict=True))
            ]
            table = ops.unit_table(regions).to(device)
            self.calls.append(ListCall(params[part], momenta[part], copies[part], table))

    def _row(self, member: Member, groups: Groups) -> tuple[int, bool]:
        """Row of the hyper table, and whether the parameter's rows do not matter."""
        standardized = self._weights is not None and member.param in self._weights.standardized
        return 2 * member.group + standardized, groups[member.group]["clipping"] is None and not standardized


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


def members(groups: Groups) -> list[Member]:
    """The parameters that have a gradient, with their groups."""
    return [Member(p, index) for index, group in enumerate(groups) for p in group["params"] if p.grad is not None]


class Tables:
    """Settings and learning rates of parameter groups on a device, for each group two rows: one for its plain
    parameters, and one for the standardized. They are written again when they change, and no host waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rows: tuple | None = None
        self._rates: list[float] = []
        self._hyper = self._lr = torch.empty(0)

    def current(self, groups: Groups, weights: ForwardWeights | None) -> tuple[Tensor, Tensor]:
        """lr (1 or a value for each row) and hyper (rows, 6), both float32."""
        eps = None if weights is None else weights.eps
        rows = tuple(ops.hyper_row(group, value) for group in groups for value in (None, eps))
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


def _kinds(groups: Groups) -> list[tuple[bool, bool]]:
    """What of a group's settings decides on units and state."""
    return [(group["clipping"] is None, group["momentum"] == 0) for group in groups]


def _momentum(param: Tensor, found: Tensor | None) -> Tensor:
    if found is None:
        return torch.zeros_like(param.detach(), dtype=torch.float32)
    if found.dtype == torch.float32 and found.device == param.device and same_layout(param, found):
        return found
    return torch.empty_like(param.detach()).copy_(found)


def _checked_dtype(grad: Tensor) -> torch.dtype:
    if grad.is_sparse:
        raise RuntimeError("AgcSgd does not support sparse gradients; use dense ones")
    if grad.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"the fused optimizer takes float32, float16 and bfloat16 gradients, found {grad.dtype}")
    return grad.dtype
