"""What optimizers behind adaptive gradient clipping have in common: which implementation steps, states, counts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engine import compiled
from engine.optim import fused, ops
from engine.optim.clipping import Clipped, Counts, Tally, adaptive_clip_counted, wide
from engine.optim.fused import ForwardWeights
from engine.optim.plan import Plan
from loaders.errors import UserError


class AgcOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` behind AGC (arXiv 2102.06171, section 4.1) that is fused where it can be.

    Subclasses say by which rule parameters are updated, and how the same is done by PyTorch's list operations.
    """

    rule: ClassVar[fused.Rule]
    clip_eps: ClassVar[str]
    """What the lower bound of a parameter's norm in the clipping rule is called among the settings."""
    foreign: ClassVar[tuple[str, ...]]
    """What a state of torch's optimizer may have set that this one does not do."""
    found_inf: Tensor | None = None
    """Of the fused implementation: one float32 on the device; where it is not 0, a step changes nothing."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        implementation: str,
        forward_weights: ForwardWeights | None,
    ) -> None:
        if isinstance(params, nn.Module):
            raise UserError(
                f"{type(self).__name__} takes parameters or groups of them, found a module; "
                f"write {type(self).__name__}(named_groups(model, weight_decay), …)"
            )
        if implementation not in ("auto", "fused", "foreach"):
            raise ValueError(f"implementation is {implementation!r}; expected 'fused', 'foreach', or 'auto' to choose")
        if forward_weights is not None and implementation == "auto":
            implementation = "fused"
        if forward_weights is not None and implementation == "foreach":
            raise UserError("forward weights are written by the fused implementation only; choose fused or auto")
        self._wanted = implementation
        self._forward_weights = forward_weights
        self._tables: fused.Tables | None = None
        self._plan: Plan | None = None
        self._counts = Counts()
        self._tallies: dict[tuple[int, ...], Tally] = {}  # of list operations, by what has gradients
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_wanted": self._wanted, "_forward_weights": self._forward_weights}
        return super().__getstate__() | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables = self._plan = None
        self._counts, self._tallies = Counts(), {}
        self._choose()

    def _choose(self) -> None:
        """Settles on an implementation for the parameters there are."""
        params = [p for group in self.param_groups for p in group["params"]]
        if not params:  # of the first groups, perhaps; a later one settles it
            self.implementation, self._step_supports_amp_scaling = "foreach", False
            return
        problem = fused.problem_with(params)
        operator = self.rule.operator
        if self._wanted == "fused":
            if problem is not None:
                raise UserError(f"the fused optimizer does not take this model: {problem}; choose foreach or auto")
            ops.require(params[0].device, operator)
        chosen = self._wanted != "foreach" and problem is None and compiled.supports(params[0].device, operator)
        self.implementation = "fused" if chosen else "foreach"
        # What torch.amp.GradScaler asks for: the scale and the overflow flag are then left on the device.
        self._step_supports_amp_scaling = chosen

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; ValueError where the group's hyper-parameters (or the defaults) are out of
        range."""
        _plain(torch.optim.Optimizer.add_param_group)(self, param_group)
        try:
            self._check(self.param_groups[-1])
            self._choose()
        except ValueError:
            self.param_groups.pop()
            raise
        self._forget_plan()

    def state_dict(self) -> dict[str, Any]:
        """As that of torch's counterpart: the state of each parameter, and the settings of the groups."""
        return _plain(torch.optim.Optimizer.state_dict)(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from the state of an optimizer of this class or of torch's counterpart, whichever implementation
        wrote it.

        Settings that the state does not have stay as they are. UserError where it is of other parameters, or
        of an optimizer that does something this one cannot.
        """
        groups = []
        for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=False):
            self._check_saved(saved, own)
            # Not own's parameters, and not torch's switches for its own code.
            kept = {key: value for key, value in own.items() if key != "params"}
            kept.update({key: value for key, value in saved.items() if key in own})
            groups.append(kept)
        groups.extend(state_dict["param_groups"][len(groups) :])
        _plain(torch.optim.Optimizer.load_state_dict)(self, {"state": state_dict["state"], "param_groups": groups})

    def _check_saved(self, saved: dict[str, Any], own: dict[str, Any]) -> None:
        for key in self.foreign:
            if saved.get(key):
                name = type(self).__name__
                raise UserError(f"the optimizer state has {key}={saved[key]}, which {name} does not do; start afresh")
        for before, now in zip(saved.get("names", ()), own.get("names", ()), strict=False):
            if before != now:
                raise UserError(
                    f"the optimizer state is of other parameters: it has {before} where this model has {now}; "
                    "resume with the network and the no_decay choice that wrote it"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all parameters that have a gradient. Returns what `closure` does, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.implementation == "fused":
            self._step_fused()
        else:
            for group in self.param_groups:
                params = [p for p in group["params"] if p.grad is not None]
                if params:
                    self._step_foreach(group, params)
        return loss

    def _step_fused(self) -> None:
        if self._plan is None or not self._plan.fits(self.param_groups, self.state):
            self._forget_plan()
            self._plan = Plan(self.rule, self.param_groups, self.state, self._forward_weights)
        if not self._plan.members:
            return
        device = self._plan.members[0].param.device
        if self._tables is None or self._tables.device != device:
            self._tables = fused.Tables(self.rule, device)
        lr, hyper = self._tables.current(self.param_groups, self._forward_weights)
        self._plan.run(lr, hyper, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def _forget_plan(self) -> None:
        for tally in self._plan.tallies if self._plan else ():
            self._counts.collect(tally)
        self._plan = None

    def clipped(self) -> dict[str, Clipped]:
        """Of each parameter that is clipped, by its name: how many of its rows were, and how many rows there were, over
        the steps since this was last asked.

        Counted as rows are written, without a pass of its own; only asking waits for the device. Equal on all ranks, as
        gradients and parameters are. A parameter without a name is GROUP.INDEX.
        """
        for tally in (*self._tallies.values(), *(self._plan.tallies if self._plan else ())):
            self._counts.collect(tally)
        found, named = self._counts.take(), {}
        for number, group in enumerate(self.param_groups):
            names = group.get("names") or group.get("param_names") or ()
            for index, param in enumerate(group["params"]):
                if param in found:
                    named[names[index] if index < len(names) else f"{number}.{index}"] = found[param]
        return named

    def _clipped_gradients(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """The gradients, clipped and counted where the group is, in a dtype to compute in. New tensors, so that what
        follows may be in place and the gradients stay as they are."""
        if any(p.grad is not None and p.grad.is_sparse for p in params):
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients; use dense ones")
        clips = group["clipping"] is not None
        grads = [p.grad.to(wide(p.dtype), copy=not clips) for p in params if p.grad is not None]
        if not clips:
            return grads
        grads, clipped = adaptive_clip_counted(params, grads, group["clipping"], group[self.clip_eps])
        which = tuple(map(id, params))
        if which not in self._tallies:
            self._tallies[which] = Tally.of_sums(params)
        self._tallies[which].add(clipped)
        return grads

    @abstractmethod
    def _step_foreach(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """A step of the parameters of a group that have a gradient, one at least."""

    @abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """ValueError where settings of a group are out of range."""

    def _check_numbers(self, group: dict[str, Any], keys: Iterable[str]) -> None:
        """What all rules have; `keys` are numbers, 0 or more."""
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; expected one number")
        for key in ("lr", *keys):
            value = group[key]
            if not isinstance(value, Tensor) and not (is_finite(value) and value >= 0):
                raise ValueError(f"{key} is {value!r}; expected a number, 0 or more")
        clipping = group["clipping"]
        if clipping is not None and not (is_finite(clipping) and clipping > 0):
            raise ValueError(f"clipping is {clipping!r}; expected a number over 0, or None for no clipping")
        for p in group["params"]:
            if not p.is_floating_point():
                raise ValueError(f"{type(self).__name__} takes real floating-point parameters; found {p.dtype}")


def _plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of torch's optimizers without the wrapper that imports torch's compiler, hundreds of files and seconds
    for each rank, only to say that this is not to be compiled."""
    return getattr(method, "__wrapped__", method)


def is_finite(value: Any) -> bool:
    """Whether it is a finite real number."""
    return isinstance(value, Real) and math.isfinite(value)
