"""Weights of BiT networks from one of the formats that people use to another, tensor for tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.network import bit, formats
from engine.network.bit import MEMBERS
from engine.network.matching import check, member
from engine.network.naming import HEAD, WORDS, timm_network
from engine.network.weights import load, read
from engine.whole import whole
from loaders.errors import UserError, in_words

ENDINGS = {".safetensors": "safetensors", ".pth": "pth", ".pth.tar": "pth", ".npz": "npz"}
"""How the name of a file to write ends → its format."""


@dataclass(frozen=True)
class Written:
    """What `convert` wrote."""

    network: str
    """Its name in `engine.network.bit.MEMBERS`."""
    parameters: int
    classes: int | None
    """Outputs of the classifier; None where the weights have none."""
    dtypes: tuple[str, ...]
    form: str
    """One of `WORDS`."""
    size: int
    """Bytes of the file."""
    said: tuple[str, ...]
    """What had to be chosen or changed to find the weights, for people."""


def convert(source: str | Path, target: str | Path, form: str | None = None, *, force: bool = False) -> Written:
    """Writes the weights in `source` (as of `load`) to the file `target`.

    `form` is one of `WORDS`; None: what the ending of `target` says. Tensors keep their dtype, but an `.npz` has
    float32. The file is read back and compared before it gets its name. UserError, and nothing written: a source
    that is no BiT network of the family, an ending that says no format or another one, a target that exists (unless
    `force`) or cannot be written.
    """
    target = Path(target)
    container = _container(target, form)
    if target.is_dir():
        raise UserError(f"{target} is a folder; name a file in it")
    if target.exists() and not force:
        raise UserError(f"{target} exists; name another file, or add --force to replace it")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent}; make it, or name a file elsewhere")
    state, said = read(source)
    network = _network(state, source)
    try:
        with whole(target) as temporary:
            formats.write(temporary, state, container, timm=form == "timm")
            back = load(temporary)
            _compare(back, state, container, target)
    except OSError as error:
        raise UserError(f"{target} could not be written ({in_words(error)}); nothing was changed") from error
    return Written(
        network=network,
        parameters=sum(tensor.numel() for tensor in back.values()),
        classes=len(back[HEAD + "weight"]) if HEAD + "weight" in back else None,
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in back.values()})),
        form=form or container,
        size=target.stat().st_size,
        said=tuple(said),
    )


def _container(target: Path, form: str | None) -> str:
    """What kind of file to write: `safetensors`, `pth` or `npz`."""
    says = next((kind for ending, kind in ENDINGS.items() if target.name.lower().endswith(ending)), None)
    if says is None and form is not None and form in ENDINGS.values():
        return form
    allowed = {None: ("safetensors", "pth", "npz"), "timm": ("safetensors", "pth")}.get(form, (form,))
    if says is None or says not in allowed:
        endings = ", ".join(ending for ending, kind in ENDINGS.items() if kind in allowed)
        instead = "or say the format with --to" if form is None else f"as --to {form} asks for"
        raise UserError(f"{target} ends otherwise than weights do; expected one of {endings}, {instead}")
    return says


def _network(state: dict[str, Tensor], source: str | Path) -> str:
    """The member that a state is of, complete but for a classifier; UserError where it is of none."""
    network = member(state)
    if network is None:
        raise UserError(
            f"{source} is of no BiT network of the family: it has {', '.join(list(state)[:3]) or 'nothing'}, …; "
            f"expected weights of one of {', '.join(MEMBERS)}"
        )
    headless = not any(name.startswith(HEAD) for name in state)
    shape = () if HEAD + "weight" not in state else state[HEAD + "weight"].shape
    with torch.device("meta"):
        own = bit.build(network, (*shape, 1)[0]).state_dict()
    check(state, {name: tensor for name, tensor in own.items() if not (headless and name.startswith(HEAD))})
    return network


def _compare(back: dict[str, Tensor], state: dict[str, Tensor], container: str, target: Path) -> None:
    for name in back | state:
        expected = state.get(name, torch.empty(0))
        expected = expected.float() if container == "npz" else expected
        found = back.get(name, torch.empty(0))
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            raise UserError(f"{target} does not read back as it was written, in {name}; the disk may be failing")


def summary(target: str, written: Written) -> str:
    """What was written, for people."""
    head = "no classifier" if written.classes is None else f"{written.classes:,} classes"
    lines = [
        f"{target}: {written.network}, {written.parameters:,} parameters, {head}, {WORDS[written.form]}, "
        f"{' and '.join(written.dtypes)}, {written.size / 1e6:,.1f} MB; read back and equal"
    ]
    lines += [f"of the source: {'; '.join(written.said)}"] if written.said else []
    theirs = timm_network(written.network)
    if written.form == "timm" and theirs:
        lines.append(f'for timm.create_model("{theirs}", num_classes={written.classes or 0})')
    elif written.form == "timm":
        lines.append(f"timm itself has no network of the shape of {written.network}")
    return "\n".join(lines)
