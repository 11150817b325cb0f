"""A step of `AgcSgd` as one call of the operator: its arguments, made once and kept from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine import ops
from loaders.errors import UserError

MAX_TENSORS = 960
"""Separate tensors in one call, as in csrc/agc_sgd.h."""


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


@dataclass(frozen=True)
class ListCall:
    """Arguments of one operator call on separate tensors. Gradients are taken from the parameters at each step, so
    that they may be new ones, and the plan keeps none alive."""

    params: Sequence[Tensor]
    momenta: Sequence[Tensor]
    copies: Sequence[Tensor]
    units: ops.UnitTable

    def run(self, lr: Tensor, hyper: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        arrays = self.params, [_laid_out_as(param, param.grad) for param in self.params], self.momenta
        tables = self.units.units, self.units.classes, lr, hyper
        amp = {"grad_scale": grad_scale, "found_inf": found_inf}
        torch.ops.boosterbit.agc_sgd_list_(*arrays, *tables, **amp, copies=self.copies)


class Plan:
    """The calls that make a step of the parameters of `groups` that have a gradient; `fits` says for how long.

    Momentum of flat parameters is put into one buffer, and `state` gets a view of it for each. The state's own values
    are kept. UserError for a gradient that the operator does not take.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict], weights: ForwardWeights | None
    ) -> None:
        self._weights = weights
        self.members = members(groups)
        self.calls: list[FlatCall | ListCall] = []
        self._momenta: dict[Tensor, Tensor] = {}
        kinds: dict[tuple, list[Member]] = {}
        for member in self.members:
            copy = None if weights is None else weights.copies.get(member.param)
            kind = _checked_dtype(member.param.grad), None if copy is None else copy.dtype
            kinds.setdefault(kind, []).append(member)
        for (_, copy_dtype), chosen in kinds.items():
            self._add_calls(chosen, copy_dtype is not None, groups, state)
        for member in self.members:
            if groups[member.group]["momentum"] != 0:
                state[member.param]["momentum_buffer"] = self._momenta[member.param]
        self._flat = any(isinstance(call, FlatCall) for call in self.calls)
        self._places = [_place(member.param, self._flat) for member in self.members]

    def fits(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict]) -> bool:
        """Whether the same parameters have gradients and momenta, at the same places as when this plan was made."""
        now = members(groups)
        return (
            len(now) == len(self.members)
            and all(a.param is b.param and a.group == b.group for a, b in zip(now, self.members, strict=True))
            and [_place(member.param, self._flat) for member in now] == self._places
            and all(
                groups[member.group]["momentum"] == 0
                or state[member.param].get("momentum_buffer") is self._momenta[member.param]
                for member in now
            )
        )

    def run(self, lr: Tensor, hyper: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """One step, with two rows of `hyper` for each group, see `Tables`."""
        for call in self.calls:
            call.run(lr, hyper, grad_scale, found_inf)

    def _add_calls(self, chosen: Sequence[Member], copied: bool, groups, state) -> None:
        params = [member.param for member in chosen]
        found = [state.get(param, {}).get("momentum_buffer") for param in params]
        copies = [self._weights.copies[param] for param in params] if copied else []
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

    def _row(self, member: Member, groups) -> tuple[int, bool]:
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


def members(groups: Sequence[Mapping[str, Any]]) -> list[Member]:
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

    def current(self, groups: Sequence[Mapping[str, Any]], weights: ForwardWeights | None) -> tuple[Tensor, Tensor]:
        """lr (1 or a value for each row) and hyper (rows, 6), both float32."""
        eps = None if weights is None else weights.eps
        rows = tuple(ops.hyper_row(group, value) for group in groups for value in (None, eps))
        if rows != self._rows:
            self._hyper, self._rows = ops.to_device(torch.tensor(rows), self.device), rows
        return self._learning_rates([group["lr"] for group in groups]), self._hyper

    def _learning_rates(self, rates: list[float | Tensor]) -> Tensor:
        # A tensor on the host can be read at once; one on the device must stay there.
        rates = [float(r) if isinstance(r, Tensor) and r.device.type == "cpu" else r for r in rates]
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


@dataclass(frozen=True)
class FlatSpan:
    """Parameters that are views of one buffer: where it begins, and how long it is, in elements."""

    first: Tensor
    begin: int
    length: int
    params: Sequence[Tensor]

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> FlatSpan | None:
        """The span of `params`, None where they lie in different buffers or sparsely in one."""
        full = [param for param in params if param.numel()]
        if not full or len({param.untyped_storage().data_ptr() for param in full}) != 1:
            return None
        begin = min(param.storage_offset() for param in full)
        end = max(param.storage_offset() + param.numel() for param in full)
        numel = sum(param.numel() for param in full)
        return cls(full[0], begin, end - begin, params) if numel <= end - begin <= 2 * numel else None

    def offset(self, param: Tensor) -> int:
        """Elements of the span before `param`; 0 where it is empty, and so anywhere."""
        return param.storage_offset() - self.begin if param.numel() else 0

    def shift(self, tensors: Sequence[Tensor | None]) -> int | None:
        """How much further in their buffer `tensors` lie than the parameters in theirs; None where they are not views
        of one buffer that has the parameters' order, layouts and gaps."""
        pairs = [(p, t) for p, t in zip(self.params, tensors, strict=True) if p.numel()]
        if any(t is None or not _same_layout(p, t) for p, t in pairs):
            return None
        shifts = {t.storage_offset() - p.storage_offset() for p, t in pairs}
        buffers = {(t.untyped_storage().data_ptr(), t.dtype) for _, t in pairs}
        return shifts.pop() if len(shifts) == len(buffers) == 1 else None

    def whole(self, tensors: Sequence[Tensor]) -> Tensor:
        """The part of the tensors' buffer that corresponds to the span, 1-D."""
        some = next(t for p, t in zip(self.params, tensors, strict=True) if p.numel())
        return some.detach().as_strided((self.length,), (1,), self.begin + self.shift(tensors))

    def view(self, buffer: Tensor, param: Tensor) -> Tensor:
        """The parameter's part of `buffer`, which is as long as the span, in its shape and layout."""
        if not param.numel():
            return torch.empty_like(param.detach(), dtype=buffer.dtype)
        return buffer.as_strided(param.shape, param.stride(), buffer.storage_offset() + self.offset(param))

    def momentum(self, found: Sequence[Tensor | None]) -> Tensor:
        """One buffer with the momenta `found`, zero where there is none yet: theirs, if it is one already."""
        if self.shift(found) is not None:
            return self.whole(found)
        buffer = torch.zeros(self.length, device=self.first.device)
        for param, momentum in zip(self.params, found, strict=True):
            if momentum is not None and param.numel():
                self.view(buffer, param).copy_(momentum)
        return buffer


def _momentum(param: Tensor, found: Tensor | None) -> Tensor:
    if found is None:
        return torch.zeros_like(param.detach(), dtype=torch.float32)
    if found.dtype == torch.float32 and found.device == param.device and _same_layout(param, found):
        return found
    return torch.empty_like(param.detach()).copy_(found)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of a shape number their elements alike; the stride of a dimension of 1 means nothing."""
    sizes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.shape == b.shape and (a.numel() == 0 or all(n == 1 or s == t for n, s, t in sizes))


def _laid_out_as(param: Tensor, grad: Tensor) -> Tensor:
    return grad if _same_layout(param, grad) else torch.empty_like(param.detach(), dtype=grad.dtype).copy_(grad)


def _checked_dtype(grad: Tensor) -> torch.dtype:
    if grad.is_sparse:
        raise RuntimeError("AgcSgd does not support sparse gradients; use dense ones")
    if grad.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"the fused optimizer takes float32, float16 and bfloat16 gradients, found {grad.dtype}")
    return grad.dtype


def _place(param: Tensor, flat: bool) -> tuple:
    return param.data_ptr(), param.grad.dtype, flat and (param.grad.data_ptr(), param.grad.stride())
