"""Weights of BiT networks: read from whatever wrote them, and put into a model.

A state is a dict of parameter name → tensor, with the names of `engine.network.bit`, which are those of the published
PyTorch code. Nothing that a file contains is ever executed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.network import formats
from engine.network.matching import check, member
from engine.network.naming import HEAD
from loaders.errors import UserError

__all__ = ["FOLDER_FILE", "Read", "apply", "digest", "load", "member", "read"]

FOLDER_FILE = "weights.safetensors"
"""The file that the folder of a checkpoint stands for."""


class Read(NamedTuple):
    """Weights as they were read."""

    state: dict[str, Tensor]
    said: list[str]
    """What had to be chosen or changed to find them, for people."""


def load(path: str | Path) -> dict[str, Tensor]:
    """The state of `read`."""
    return read(path).state


def read(path: str | Path) -> Read:
    """The weights in a file, on the CPU, in the dtypes that the file has.

    Known by their content, not by their names: safetensors; the official `.npz` of BiT; `.pth` and `.pth.tar`
    of PyTorch, as a state dict or with one as an entry of those in `states.py`, the averaged one first; safetensors and
    PyTorch also under the prefixes of wrappers, and with timm's names of a BiT, which are translated; and a folder that
    has a `weights.safetensors`. UserError: nothing there, another format, a damaged file, a pickle that asks
    for more than tensors, an optimizer's state, a weight that is not finite.
    """
    if not str(path):
        raise UserError("no checkpoint is named; give a file or a run's folder")
    path = Path(path)
    if path.is_dir():
        path = path / FOLDER_FILE
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give a file or a folder that has a {FOLDER_FILE}")
    state, said = formats.read(path)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} has a weight that is not finite, in {name}; take an earlier checkpoint")
    return Read(state, said)


def digest(state: dict[str, Tensor]) -> str:
    """Equal for equal weights, whatever file they are in: 16 digits of the SHA-256 of names, types, shapes, values."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def apply(model: nn.Module, state: dict[str, Tensor], *, new_head: bool, head: str = HEAD) -> None:
    """Copies a state into a model, or changes nothing and raises UserError where it does not fit.

    With `new_head` the model keeps its own classifier and the state's is ignored, whatever its size; `head` is what the
    names of its parameters start with.
    """
    own = model.state_dict()
    if new_head:
        own = {name: tensor for name, tensor in own.items() if not name.startswith(head)}
        state = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    check(state, own)
    model.load_state_dict(state, strict=not new_head)
