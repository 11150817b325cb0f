"""Reading weights of BiT networks, from whatever wrote them, and putting them into a model.

A state is a dict of parameter name → tensor, with the names of `engine.bit`, which are those of the published
PyTorch code. Nothing that a file contains is ever executed.
"""

import difflib
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from engine.bit import MEMBERS
from loaders.errors import UserError

FOLDER_FILE = "weights.safetensors"
"""The file that a folder of a run stands for."""

HEAD = "head.conv."
"""What the names of the classifier's parameters start with."""

NPZ_LAYERS = {"a": "1", "b": "2", "c": "3"}
"""Letters of a unit's layers in the official files → numbers here."""


def load(path: str | Path) -> dict[str, Tensor]:
    """The state in a file, on the CPU, in the dtypes that the file has.

    Known by their content, not by their names: safetensors; the official `.npz` of BiT; `.pth` and `.pth.tar`
    of PyTorch, as a state dict or with one as the entry `model`, with or without the prefix `module.`; and a
    folder that has a `weights.safetensors`. UserError: nothing there, another format, a damaged file, a
    pickle that asks for more than tensors, a weight that is not finite.
    """
    if not str(path):
        raise UserError("no checkpoint is named; give a file or a run's folder")
    path = Path(path)
    if path.is_dir():
        path = path / FOLDER_FILE
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give a file or a folder that has a {FOLDER_FILE}")
    state = _reader(path)(path)
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
    differing = [_difference(name, state, own) for name in own | state if not _fits(name, state, own)]
    if differing:
        raise UserError(_misfit(differing, state, own))
    model.load_state_dict(state, strict=not new_head)


def member(state: dict[str, Tensor]) -> str | None:
    """The name of the network in `engine.bit.MEMBERS` that a state is of, by its shapes; None for another
    one."""
    root = state.get("root.conv.weight")
    if root is None:
        return None
    kernels = {"imagenet": 7, "half": 3, "same": 3}
    for name, spec in MEMBERS.items():
        if (spec.depths, spec.root_channels, kernels[spec.root]) == (_depths(state), *root.shape[::3]):
            return name
    return None


def _depths(state: dict[str, Tensor]) -> tuple[int, ...]:
    units = [re.match(r"body\.block(\d+)\.unit\d+\.conv1\.weight$", name) for name in state]
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
    if all(line.startswith(HEAD) for line in differing) and head in state and head in own:
        return (
            f"the checkpoint's classifier is for {len(state[head])} classes and this network's for "
            f"{len(own[head])}; give it a new one (new_head, as fine-tuning does) or build the network with "
            f"num_classes={len(state[head])}"
        )
    there, here = (member(s) or "no network of the family" for s in (state, own))
    if not set(state) & set(own):
        near = difflib.get_close_matches(next(iter(own)), state, 1, 0.0)
        there = f"of something else (it has {near[0]!r})" if near else "empty"
        return f"the checkpoint is {there}, and this network is {here}; give a checkpoint of a BiT network"
    return (
        f"the checkpoint is of {there} and this network is {here}: {len(differing)} parameters differ, first "
        f"{'; '.join(differing[:3])}. Build the network that the checkpoint is of, or give another checkpoint"
    )


def _reader(path: Path) -> Callable[[Path], dict[str, Tensor]]:
    with path.open("rb") as file:
        start = file.read(9)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith(".npy") for name in names):
            return _read_npz
        if any(name.endswith("data.pkl") for name in names):
            return _read_torch
    elif start[8:] == b"{":
        return _read_safetensors
    elif start[:1] == b"\x80":
        return _read_torch
    raise UserError(
        f"{path} is neither safetensors, nor an official .npz, nor a PyTorch checkpoint, or is cut short; "
        "expected weights in one of these formats"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is a damaged safetensors file ({error}); get it again") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: its pickle is damaged or asks for more than tensors and plain values, which "
            "could run any code; where it is trusted, save its state dict alone again, as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is a damaged PyTorch checkpoint ({error}); get it again") from error
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        found = f"a dict of {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state)
        raise UserError(f"{path} has {found}; expected a state dict, or one as the entry 'model'")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _read_npz(path: Path) -> dict[str, Tensor]:
    state = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = arrays[name]
                if array.ndim == 4:
                    array = array.transpose(3, 2, 0, 1)  # TensorFlow keeps height, width, in, out
                state[_npz_name(name, path)] = torch.from_numpy(np.ascontiguousarray(array))
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is a damaged .npz, or one with more than arrays ({error})") from error
    return state


def _npz_name(name: str, path: Path) -> str:
    """`resnet/block1/unit01/a/group_norm/gamma` → `body.block1.unit01.gn1.weight`, and so on."""
    stem, _, leaf = name.removeprefix("resnet/").rpartition("/")
    leaf = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}.get(leaf)
    module = {
        "root_block/standardized_conv2d": "root.conv",
        "group_norm": "head.gn",
        "head/conv2d": "head.conv",
    }.get(stem)
    unit = re.fullmatch(r"(block\d+)/(unit\d+)/([abc])/(proj/)?(standardized_conv2d|group_norm)", stem)
    if unit:
        block, number, layer, projection, kind = unit.groups()
        part = "gn" if kind == "group_norm" else "conv"
        module = f"body.{block}.{number}." + ("downsample" if projection else part + NPZ_LAYERS[layer])
    if module is None or leaf is None:
        raise UserError(
            f"{path} has an array {name!r}; expected the official BiT names, such as "
            "resnet/block1/unit01/a/standardized_conv2d/kernel"
        )
    return f"{module}.{leaf}"
