"""Weights files as they are on disk: known by their content when read, written as their makers write them.

A state is a dict of parameter name → tensor on the CPU. Nothing that a file contains is ever executed.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from engine.network import states
from engine.network.naming import OFFICIAL, PUBLISHED, TIMM, Naming, rename
from engine.whole import system_speaks
from loaders.errors import UserError, reading

_DENSEST, _SPARE = 8, 1 << 20  # bytes that a byte of compressed weights may stand for; and in any case


def read(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state in a file, by the names of the published PyTorch code where it is a BiT network's, else by its own; and
    what was done to find it, for people (see `states.py`).

    UserError: another format, a damaged file, a pickle that asks for more than tensors, no weights, or several.
    """
    state, picked = states.chosen(_reader(path)(path), path)
    for name, tensor in state.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(
                f"{path} has {name} of {tuple(tensor.shape)}, and {tensor.untyped_storage().nbytes():,} bytes for it: "
                "its elements lie on top of each other; save a contiguous copy"
            )
    state, cleaned = states.unwrapped(state, path)
    return _from_timm(state), [*picked, *cleaned]


def write(path: Path, state: dict[str, Tensor], form: str, timm: bool) -> None:
    """Write a state to `path` as `form`: `safetensors`, `pth` or `npz` (of float32). OSError where that fails.

    Names are the published ones (in an `.npz` the official ones), or timm's. A `pth` has the published layout, a
    dict with the state as its entry `model`; with timm's names it is the state itself, as timm's own are.
    """
    # Each tensor in a storage of its own: a view of a larger one would be saved with all of it, or not at all.
    state = {
        _renamed(name, TIMM) if timm else name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    with system_speaks(path):
        if form == "safetensors":
            path.touch()
            mode = path.stat().st_mode
            safetensors.torch.save_file(state, path, metadata={"format": "pt"})
            path.chmod(mode)  # its own file is for nobody else to read
            return
        with path.open("wb") as file:
            if form == "npz":
                np.savez(file, allow_pickle=False, **_to_npz(state))
            else:
                torch.save(state if timm else {states.PLAIN[0]: state}, file)


def _reader(path: Path) -> Callable[[Path], Any]:
    with path.open("rb") as file:
        start = file.read(9)
    with _parsing(path, "a zip archive"):
        names = _archived(path)
    if any(name.endswith(".npy") for name in names):
        return _read_npz
    if any(name.endswith("data.pkl") for name in names):
        return _read_torch
    if start[8:] == b"{":
        return _read_safetensors
    if start[:1] == b"\x80":
        return _read_torch
    raise UserError(
        f"{path} is neither safetensors, nor an official .npz, nor a PyTorch checkpoint, or is cut short; "
        "expected weights in one of these formats"
    )


def _archived(path: Path) -> list[str]:
    """Names in a zip archive; none of another file."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        size, inside = path.stat().st_size, sum(member.file_size for member in archive.infolist())
        if inside > _SPARE + _DENSEST * size:
            raise UserError(f"{path} of {size:,} bytes unpacks to {inside:,}, more than weights do; get it again")
        return archive.namelist()


@contextmanager
def _parsing(path: Path, what: str) -> Iterator[None]:
    """Around what a library does to a file. UserError with what its pickle asks for, or as of `reading`."""
    try:
        with reading(path, what, "get it again"):
            yield
    except UserError as refused:
        error = refused.__cause__
        if not isinstance(error, pickle.UnpicklingError):
            raise
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"{path} is refused: its pickle {f'asks for {wanted[1]}' if wanted else 'is damaged or asks for more'}, "
            "and only tensors and plain values are read, since anything else could run any code; where the file is "
            "trusted, save its state dict alone again, as safetensors"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _parsing(path, "a safetensors file"):
        return safetensors.torch.load_file(path)


def _read_torch(path: Path) -> Any:
    with _parsing(path, "a PyTorch checkpoint"):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_npz(path: Path) -> dict[str, Tensor]:
    with _parsing(path, "an .npz of arrays alone"), np.load(path, allow_pickle=False) as file:
        _check_headers(path)
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    return {
        # TensorFlow keeps height, width, in, out
        _from_official(name, path): (array.permute(3, 2, 0, 1) if array.ndim == 4 else array).contiguous()
        for name, array in arrays.items()
    }


def _check_headers(path: Path) -> None:
    """ValueError where an array is larger than what is there of it: NumPy takes the memory before it reads."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            if math.prod(shape) * dtype.itemsize > member.file_size:
                raise ValueError(f"{member.filename} is said to be of {shape}, and has {member.file_size:,} bytes")


def _from_official(name: str, path: Path) -> str:
    found = rename("resnet/" + name.removeprefix("resnet/"), OFFICIAL, PUBLISHED)
    if found is None:
        raise UserError(
            f"{path} has an array {name!r}; expected the official BiT names, such as "
            "resnet/block1/unit01/a/standardized_conv2d/kernel"
        )
    return found


def _renamed(name: str, naming: Naming) -> str:
    found = rename(name, PUBLISHED, naming)
    assert found is not None, f"{name} is no parameter of a BiT network, which was checked before"
    return found


def _to_npz(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Name → array as `_read_npz` expects it."""
    arrays = {}
    for name, tensor in state.items():
        array = tensor.float().numpy()
        if array.ndim == 4:
            array = np.ascontiguousarray(array.transpose(2, 3, 1, 0))
        arrays[_renamed(name, OFFICIAL)] = array
    return arrays


def _from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state by the published names where all of its names are those of timm's BiT; else as it is."""
    renamed = {}
    for name, tensor in state.items():
        ours = rename(name, TIMM, PUBLISHED)
        if ours is None:
            return state
        renamed[ours] = tensor
    head = renamed.get("head.conv.weight")
    if head is not None and head.ndim == 2:  # a linear classifier, where the network was not built as a convolution
        renamed["head.conv.weight"] = head[:, :, None, None]
    return renamed
