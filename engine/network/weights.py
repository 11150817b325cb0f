"""Weights of BiT networks: read from whatever wrote them, and put into a model.

A state is a dict of parameter name → tensor, with the names of `engine.network.bit`, which are those of the published
PyTorch code. Nothing that a file contains is ever executed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from engine.network import formats
from engine.network.matching import check, member
from engine.network.naming import HEAD
from loaders.errors import UserError

__all__ = ["FOLDER_FILE", "apply", "load", "member"]

FOLDER_FILE = "weights.safetensors"
"""The file that the folder of a checkpoint stands for."""


def load(path: str | Path) -> dict[str, Tensor]:
    """The state in a file, on the CPU, in the dtypes that the file has.

    Known by their content, not by their names: safetensors; the official `.npz` of BiT; `.pth` and `.pth.tar`
    of PyTorch, as a state dict or with one as the entry `model` or `state_dict`, with or without the prefix
    `module.`; safetensors and PyTorch also with timm's names of a BiT, which are translated; and a folder that
    has a `weights.safetensors`. UserError: nothing there, another format, a damaged file, a pickle that asks
    for more than tensors, a weight that is not finite.
    """
    if not str(path):
        raise UserError("no checkpoint is named; give a file or a run's folder")
    path = Path(path)
    if path.is_dir():
        path = path / FOLDER_FILE
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give a file or a folder that has a {FOLDER_FILE}")
    state = formats.read(path)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path} has a weight that is not finite, in {name}; take an earlier checkpoint")
    return state


def apply(model: nn.Module, state: dict[str, Tensor], *, new_head: bool) -> None:
    """Copies a state into a model, or changes nothing and raises UserError where it does not fit.

    With `new_head` the model keeps its own classifier and the state's is ignored, whatever its size.
    """
    own = model.state_dict()
    if new_head:
        own = {name: tensor for name, tensor in own.items() if not name.startswith(HEAD)}
        state = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)}
    check(state, own)
    model.load_state_dict(state, strict=not new_head)
