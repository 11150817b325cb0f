"""Which parameters of a network are clipped, by how much, and which decay."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from engine.network.states import WRAPPERS
from loaders.errors import UserError, shorten


def named_groups(
    model: nn.Module,
    weight_decay: float,
    no_decay: str = "none",
    head: str | None = None,
    clipping: Mapping[str, float | None] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for `AgcSgd` and `AgcAdamW`, of any network.

    The classifier is not clipped: the module named `head`, or where None is named the last one with parameters if it
    is a linear layer or a 1 by 1 convolution, such as `head.conv` of a BiT and `fc` of torchvision's ResNets; an empty
    name says that there is none. `clipping` has patterns of the names of modules or parameters (`layer4`,
    `blocks.*.attn`, `*.bias`), and for all that is in a module of such a name the share of the weights' norm, or None
    for no clipping; the first that fits counts, for all but the classifier. `no_decay` says what has no weight decay:
    `none` of the parameters, or `norm_bias`: those of normalization layers (modules of a type with Norm in its name or
    in that of a type it derives from), all biases, and what else has fewer than 2 dimensions. Each group has `params`,
    their `names`, `weight_decay`, and `clipping` where it is not the optimizer's; empty ones are left out, and so are
    frozen parameters. What wrappers such as DDP and torch.compile put into names does not matter. UserError: another
    `no_decay`, a model without that head or whose head cannot be told, a pattern that fits nothing.
    """
    if no_decay not in ("none", "norm_bias"):
        raise UserError(f"no_decay is {no_decay!r}; expected none or norm_bias")
    trained = {name: _plain(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = _classifier(model) if head is None else _plain(head)
    body = [name for name in trained.values() if not (head and name.startswith(f"{head}."))]
    if head and len(body) == len(trained):
        raise UserError(
            f"no trainable parameter is in a module {head!r}, which would be the classifier; {_hint(model, head)}, or "
            "say head='' where the model has none"
        )
    rules = clipping or {}
    for pattern in rules:
        if not any(_fits(pattern, name) for name in body):
            raise UserError(
                f"clipping: {pattern!r} is only the classifier, which is not clipped; say head='' to clip it"
                if any(_fits(pattern, name) for name in trained.values())
                else f"clipping: nothing with trainable parameters is named {pattern!r}; {_hint(model, pattern)}"
            )
    norms = {name for name, module in model.named_modules() if _is_norm(module)}
    in_body = set(body)
    groups: dict[tuple[bool, float | None, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if name not in trained:
            continue
        module, _, leaf = name.rpartition(".")
        decays = no_decay == "none" or not (parameter.ndim < 2 or leaf == "bias" or module in norms)
        clips, own = _rule(rules, trained[name]) if trained[name] in in_body else (None, True)
        empty = {"params": [], "names": [], "weight_decay": weight_decay if decays else 0.0}
        group = groups.setdefault((own, clips, decays), empty | ({"clipping": clips} if own else {}))
        group["params"].append(parameter)
        group["names"].append(name)
    # First what the optimizer clips, last what nobody does; of each, first what decays.
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], key[1] is None, key[1] or 0.0, not key[2]))]


def _rule(rules: Mapping[str, float | None], name: str) -> tuple[float | None, bool]:
    """What the first pattern that fits says, and whether one does."""
    for pattern, clips in rules.items():
        if _fits(pattern, name):
            return clips, True
    return None, False


def _classifier(model: nn.Module) -> str:
    """The name of the last module that has parameters of its own, if it can be a classifier. UserError if not."""
    owners = [(name, module) for name, module in model.named_modules() if any(True for _ in module.parameters(False))]
    name, last = owners[-1] if owners else ("", model)
    weights = [parameter for parameter in last.parameters(False) if parameter.ndim > 1]
    maps = any(all(size == 1 for size in weight.shape[2:]) for weight in weights)
    if _plain(name) and maps and not isinstance(last, nn.Embedding | nn.EmbeddingBag):
        return _plain(name)
    found = "there are no parameters"
    if owners:
        where = f"{_plain(name)!r}, is" if _plain(name) else "the model itself, is"
        found = f"the last module with parameters, {where} a {type(last).__name__}"
    raise UserError(
        f"it cannot be told which module would be the classifier, which is not clipped: {found}; expected a linear "
        f"layer or a 1 by 1 convolution in a module. Name it with head='NAME' ({_hint(model, '')}), or say head='' "
        "where the model has none"
    )


def _fits(pattern: str, name: str) -> bool:
    """Whether a pattern is of a parameter, or of a module that it is in, at any depth."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))


def _hint(model: nn.Module, name: str) -> str:
    owners = [_plain(name) for name, module in model.named_modules() if any(True for _ in module.parameters())]
    names = [name for name in dict.fromkeys(owners) if name]
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]!r}?" if near else f"the last modules are {shorten(names[-3:]) or 'none'}"


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _is_norm(module: nn.Module) -> bool:
    return any("norm" in kind.__name__.lower() for kind in type(module).__mro__)
