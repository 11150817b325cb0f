"""The state dict that is meant in what others have saved: among a checkpoint's entries, under prefixes of wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.network.naming import PUBLISHED, TIMM, rename
from loaders.errors import UserError, shorten

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
"""What the moving average of the weights is called in a training checkpoint: what its maker evaluates and publishes."""
PLAIN = ("model", "state_dict", "model_state_dict", "network", "net", "module", "weights", "params")
"""What the state dict is called: by the published code first, by timm and Lightning, by others."""
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What wrappers put between the parts of a name: DataParallel and DDP, torch.compile, FSDP, activation checkpoints."""
COUNTERS = ("n_averaged",)
"""What `torch.optim.swa_utils.AveragedModel` has beside the weights."""
_OPTIMIZER = "param_groups"


def chosen(content: Any, path: Path, depth: int = 4) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in what a PyTorch file holds, and what had to be chosen for it, for people. UserError: none,
    down to `depth` entries within entries."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path} has {type(content)}; expected a state dict, or a dict that has one as an entry")
    if content and all(_is_parameter(*item) for item in content.items()):
        return dict(content), []
    entries = [name for name in (*AVERAGED, *PLAIN) if isinstance(content.get(name), Mapping) and content[name]]
    states = [name for name in entries if _OPTIMIZER not in content[name]]
    if not states or not depth:
        raise UserError(f"{path} {_instead(content)}")
    name = states[0]
    state, said = chosen(content[name], path, depth - 1)
    if name in AVERAGED:
        others = [other for other in states[1:] if other in PLAIN]
        said = [f"took the averaged weights, {name}" + (f", not {others[0]}" if others else ""), *said]
    return state, said


def unwrapped(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """A state by the names that the network itself gives: without what wrappers put in them, anywhere, and without the
    attribute under which a larger module has the network; and what was done, for people.

    UserError where two tensors that differ get one name, or where several networks are in it.
    """
    plain: dict[str, Tensor] = {}
    found: dict[str, None] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        found |= dict.fromkeys(part for part in parts if part in WRAPPERS)
        short = ".".join(part for part in parts if part not in WRAPPERS)
        if short in COUNTERS:
            continue
        if short in plain and not torch.equal(plain[short], tensor):
            raise UserError(
                f"{path} has two tensors for {short}, with {' and '.join(found)} in the name and without, and they "
                "differ; save the state dict that is meant alone"
            )
        plain[short] = tensor
    said = [f"took {' and '.join(found)} out of the names"] if found else []
    inside = {name.removesuffix(root) for name in plain for root in _ROOTS if name.endswith(f".{root}")}
    if any(_known(name) for name in plain) or not inside:
        return plain, said
    if len(inside) > 1:
        raise UserError(
            f"{path} holds several networks: {shorten(sorted(prefix.rstrip('.') for prefix in inside))}; save the "
            "state dict of the one that is meant alone"
        )
    (prefix,) = inside
    within = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
    said.append(f"took what is under {prefix.rstrip('.')}")
    if beside := [name for name in plain if not name.startswith(prefix)]:
        said.append(f"left out {len(beside):,} tensors beside it, such as {beside[0]}")
    return within, said


_ROOTS = ("root.conv.weight", "stem.conv.weight")  # the first kernel of a network: here, in timm


def _known(name: str) -> bool:
    return rename(name, TIMM, PUBLISHED) is not None or rename(name, PUBLISHED, TIMM) is not None


def _is_parameter(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _instead(content: Mapping[Any, Any]) -> str:
    """What a file holds in place of a state dict, and what to do."""
    names = [str(name) for name in content]
    nested = [name for name, value in content.items() if isinstance(value, Mapping) and _OPTIMIZER in value]
    if _OPTIMIZER in content or nested:
        held = f"holds the state of an optimizer{f' ({nested[0]})' if nested else ''} and no weights"
        if "step" in content and "scaler" in content:
            return f"{held}: it is part of a checkpoint of this engine; give the folder that it is in"
        return f"{held}; give the file that the model was saved to"
    held = f"a dict of {shorten(names)}" if names else "an empty dict"
    return f"has {held}; expected a state dict, or one as an entry such as {', '.join(PLAIN[:3])} or {AVERAGED[0]}"
