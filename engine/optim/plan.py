"""A step of an optimizer as one call of its operator: its arguments, made once and kept from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from engine.optim import ops
from engine.optim.clipping import Tally
from engine.optim.fused import ForwardWeights, Groups, Rule
from engine.optim.span import FlatSpan, laid_out_as, same_layout
from loaders.errors import UserError

State = Mapping[Tensor, dict[str, Any]]
"""Of an optimizer: a parameter's tensors by name; one of a new parameter is empty."""


@dataclass(frozen=True)
class Member:
    """A parameter that takes part in a step."""

    param: Tensor
    group: int
    """Its parameter group."""


@dataclass(frozen=True)
class FlatCall:
    """Arguments of one operator call on buffers that hold all parameters, gradients, states, and copies if any."""

    operator: Callable[..., None]
    params: Tensor
    grads: Tensor
    states: Sequence[Tensor]
    units: ops.UnitTable
    step: tuple[Tensor, ...]
    """The count of steps, or nothing."""
    more: Mapping[str, Any]
    """Averages, copies, counters, as the operator names them."""

    def run(self, lr: Tensor, hyper: Tensor, amp: Mapping[str, Tensor | None]) -> None:
        tables = self.units.units, self.units.classes, lr, hyper
        self.operator(self.params, self.grads, *self.states, *tables, *self.step, **amp, **self.more)


def gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter that takes part in a step, and so has one."""
    assert param.grad is not None
    return param.grad


@dataclass(frozen=True)
class ListCall:
    """Arguments of one operator call on separate tensors. Gradients are taken from the parameters at each step, so
    that they may be new ones, and the plan keeps none alive."""

    operator: Callable[..., None]
    params: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    units: ops.UnitTable
    step: tuple[Tensor, ...]
    more: Mapping[str, Any]

    def run(self, lr: Tensor, hyper: Tensor, amp: Mapping[str, Tensor | None]) -> None:
        arrays = self.params, [_laid_out(param, gradient(param)) for param in self.params], *self.states
        tables = self.units.units, self.units.classes, lr, hyper
        self.operator(*arrays, *tables, *self.step, **amp, **self.more)


def _laid_out(param: Tensor, grad: Tensor) -> Tensor:
    # Nearly always so, and told in a tenth of the time; a gradient has its parameter's shape.
    return grad if grad.stride() == param.stride() else laid_out_as(param, grad)


@dataclass(frozen=True)
class Kind:
    """What parameters of one call have in common."""

    grad: torch.dtype
    copy: torch.dtype | None
    averages: bool
    steps: float | None
    """That they have done; None where they are not counted."""


class Plan:
    """The calls that make a step of the parameters of `groups` that have a gradient; `fits` says for how long.

    States of flat parameters are put into one buffer each, and `state` gets a view of it for each parameter. The
    state's own values are kept. UserError for a gradient that the operator does not take.
    """

    def __init__(self, rule: Rule, groups: Groups, state: State, weights: ForwardWeights | None) -> None:
        self._rule, self._weights = rule, weights
        self.members = members(groups)
        self.calls: list[FlatCall | ListCall] = []
        self.tallies: list[Tally] = []
        steps = _steps(self.members, state) if rule.counts_steps else {}
        kinds: dict[Kind, list[Member]] = {}
        for member in self.members:
            copy = None if weights is None else weights.copies.get(member.param)
            dtypes = _checked_dtype(gradient(member.param)), None if copy is None else copy.dtype
            kind = Kind(*dtypes, rule.kind(groups[member.group])[2], steps.get(member.param))
            kinds.setdefault(kind, []).append(member)
        for kind, chosen in kinds.items():
            self._add_calls(kind, chosen, groups, state)
        self._flat = any(isinstance(call, FlatCall) for call in self.calls)
        self._params = [p for group in groups for p in group["params"]]
        self._grads = [p.grad if self._flat or p.grad is None else p.grad.dtype for p in self._params]
        self._addresses = self._find()
        self._states = len(state)
        self._kinds = [rule.kind(group) for group in groups]

    def _find(self) -> list[int]:
        grads = [grad for grad in self._grads if grad is not None] if self._flat else []
        return [tensor.data_ptr() for tensor in (*self._params, *grads)]

    def fits(self, groups: Groups, state: State) -> bool:
        """Whether the same parameters have gradients, at the same places as when this plan was made.

        This is most of what the host does in a step, so it looks at each tensor as little as it can.
        """
        params = [p for group in groups for p in group["params"]]
        if len(params) != len(self._params) or not all(map(is_, params, self._params)) or len(state) != self._states:
            return False
        if self._kinds != [self._rule.kind(group) for group in groups]:
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
            call.run(lr, hyper, {"grad_scale": grad_scale, "found_inf": found_inf})

    def _add_calls(self, kind: Kind, chosen: Sequence[Member], groups: Groups, state: State) -> None:
        params = [member.param for member in chosen]
        copies = [self._weights.copies[param] for param in params] if self._weights and kind.copy else []
        grads = [param.grad for param in params]
        span = FlatSpan.of(params)
        if span is not None and all(span.shift(tensors) is not None for tensors in (grads, copies) if tensors):
            self._add_flat(kind, chosen, span, copies, groups, state)
            return
        for begin in range(0, len(params), self._rule.max_tensors):
            part = slice(begin, begin + self._rule.max_tensors)
            self._add_list(kind, chosen[part], copies[part], groups, state)

    def _add_flat(
        self, kind: Kind, chosen: Sequence[Member], span: FlatSpan, copies: list[Tensor], groups: Groups, state: State
    ) -> None:
        params = [member.param for member in chosen]
        buffers = {name: span.buffer(tensors) for name, tensors in self._found(kind, params, state).items()}
        kept = {name: [span.view(buffer, param) for param in params] for name, buffer in buffers.items()}
        units, step, more = self._tables(kind, chosen, [(span.offset(param), 0) for param in params], groups)
        more |= {"copy": span.whole(copies) if copies else None}
        more |= {self._rule.average: buffers[self._rule.average]} if kind.averages else {}
        arrays = span.whole(params), span.whole([param.grad for param in params])
        states = [buffers[name] for name in self._rule.states]
        operator = getattr(torch.ops.boosterbit, self._rule.operator)
        self.calls.append(FlatCall(operator, *arrays, states, units, step, more))
        self._keep(chosen, kept, step, groups, state)

    def _add_list(
        self, kind: Kind, chosen: Sequence[Member], copies: list[Tensor], groups: Groups, state: State
    ) -> None:
        params, average = [member.param for member in chosen], self._rule.average
        found = self._found(kind, params, state)
        kept = {
            name: [_laid_out_state(param, tensor) for param, tensor in zip(params, tensors, strict=True)]
            for name, tensors in found.items()
        }
        units, step, more = self._tables(kind, chosen, [(0, index) for index in range(len(params))], groups)
        more |= {"copies": copies} | ({f"{average}s": kept.get(average, [])} if average else {})
        states = [kept[name] for name in self._rule.states]
        operator = getattr(torch.ops.boosterbit, f"{self._rule.operator}list_")
        self.calls.append(ListCall(operator, params, states, units, step, more))
        self._keep(chosen, kept, step, groups, state)

    def _found(self, kind: Kind, params: Sequence[Tensor], state: State) -> dict[str, list[Tensor | None]]:
        """What the state has so far; a new average is the parameter."""
        names = (*self._rule.states, self._rule.average) if kind.averages else self._rule.states
        found = {name: [state.get(param, {}).get(name) for param in params] for name in names}
        if kind.averages:
            average = zip(params, found[self._rule.average], strict=True)
            found[self._rule.average] = [p.detach().clone() if tensor is None else tensor for p, tensor in average]
        return found

    def _tables(
        self, kind: Kind, chosen: Sequence[Member], places: Sequence[tuple[int, int]], groups: Groups
    ) -> tuple[ops.UnitTable, tuple[Tensor, ...], dict[str, Any]]:
        """Units, the count of steps where there is one, and counters of clipped ones; places: (offset, tensor)."""
        regions = []
        for member, (offset, tensor) in zip(chosen, places, strict=True):
            standardized = self._weights is not None and member.param in self._weights.standardized
            free = groups[member.group]["clipping"] is None and not standardized  # rows do not matter
            regions.append(ops.Region(member.param.shape, offset, 2 * member.group + standardized, tensor, free))
        device = chosen[0].param.device
        units = ops.unit_table(regions).to(device)
        clips = [groups[member.group]["clipping"] is not None for member in chosen]
        self.tallies.append(Tally.of([member.param for member in chosen], clips, units.owners))
        step = () if kind.steps is None else (torch.full((), kind.steps, device=device),)
        return units, step, {"clipped": self.tallies[-1].counters}

    def _keep(
        self,
        chosen: Sequence[Member],
        kept: Mapping[str, Sequence[Tensor]],
        step: tuple[Tensor, ...],
        groups: Groups,
        state: State,
    ) -> None:
        for index, member in enumerate(chosen):
            if self._rule.kind(groups[member.group])[1]:
                state[member.param].update(("step", count) for count in step)
                state[member.param].update((name, tensors[index]) for name, tensors in kept.items())


def members(groups: Groups) -> list[Member]:
    """The parameters that have a gradient, with their groups."""
    return [Member(p, index) for index, group in enumerate(groups) for p in group["params"] if p.grad is not None]


def _steps(chosen: Sequence[Member], state: State) -> dict[Tensor, float]:
    """How many steps each parameter has done, which is read from the device: once for each tensor that says so."""
    said = {member.param: state.get(member.param, {}).get("step") for member in chosen}
    tensors = {id(steps): steps for steps in said.values() if isinstance(steps, Tensor)}
    read = [steps.float().reshape(()) for steps in tensors.values()]
    numbers = dict(zip(tensors, torch.stack(read).tolist() if read else [], strict=True))
    return {param: numbers.get(id(steps), float(steps or 0.0)) for param, steps in said.items()}


def _laid_out_state(param: Tensor, found: Tensor | None) -> Tensor:
    if found is None:
        return torch.zeros_like(param.detach(), dtype=torch.float32)
    if found.dtype == torch.float32 and found.device == param.device and same_layout(param, found):
        return found
    return torch.empty_like(param.detach()).copy_(found)


def _checked_dtype(grad: Tensor) -> torch.dtype:
    if grad.is_sparse:
        raise RuntimeError("the fused optimizer does not support sparse gradients; use dense ones")
    if grad.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UserError(f"the fused optimizer takes float32, float16 and bfloat16 gradients, found {grad.dtype}")
    return grad.dtype
