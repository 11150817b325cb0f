"""Which network a state is of, and whether it fits one: by its names and shapes alone."""

from __future__ import annotations

import difflib
import re

from torch import Tensor

from engine.network.family import MEMBERS
from engine.network.naming import HEAD
from loaders.errors import UserError


def member(state: dict[str, Tensor]) -> str | None:
    """The name of the network in `engine.network.bit.MEMBERS` that a state is of, by its shapes; None for another
    one."""
    root = state.get("root.conv.weight")
    if root is None:
        return None
    kernels = {"imagenet": 7, "half": 3, "same": 3}
    for name, spec in MEMBERS.items():
        if (spec.depths, spec.root_channels, kernels[spec.root]) == (_depths(state), *root.shape[::3]):
            return name
    return None


def check(state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """UserError unless a state has the names and shapes of `own`, a network's."""
    differing = [_difference(name, state, own) for name in own | state if not _fits(name, state, own)]
    if differing:
        raise UserError(_misfit(differing, state, own))


def _depths(state: dict[str, Tensor]) -> tuple[int, ...]:
    units = [re.match(r"body\.block(\d{1,3})\.unit\d+\.conv1\.weight$", name) for name in state]
    blocks = [int(unit[1]) for unit in units if unit]
    return tuple(blocks.count(i) for i in range(1, max(blocks, default=0) + 1))


def _fits(name: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    return name in state and name in own and state[name].shape == own[name].shape


def _difference(name: str, state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    there = tuple(state[name].shape) if name in state else "missing"
    here = tuple(own[name].shape) if name in own else "missing"
    return f"{name} ({there} in the checkpoint, {here} in the network)"


def _misfit(differing: list[str], state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    head = HEAD + "weight"
    if all(line.startswith(HEAD) for line in differing) and _classes_differ(state.get(head), own.get(head)):
        return (
            f"the checkpoint's classifier is for {len(state[head])} classes and this network's for "
            f"{len(own[head])}; give it a new one (new_head, as fine-tuning does) or build the network with "
            f"num_classes={len(state[head])}"
        )
    there, here = (member(s) or "no network of the family" for s in (state, own))
    if not set(state) & set(own):
        near = difflib.get_close_matches(next(iter(own)), state, 1, 0.0)
        there = f"of something else (it has {near[0]!r})" if near else "empty"
        wanted = "this network" if member(own) is None else "a BiT network"
        return f"the checkpoint is {there}, and this network is {here}; give a checkpoint of {wanted}"
    return (
        f"the checkpoint is of {there} and this network is {here}: {len(differing)} parameters differ, first "
        f"{'; '.join(differing[:3])}. Build the network that the checkpoint is of, or give another checkpoint"
    )


def _classes_differ(there: Tensor | None, here: Tensor | None) -> bool:
    if there is None or here is None or there.ndim != here.ndim:
        return False
    return there.shape[1:] == here.shape[1:] and len(there) != len(here)
