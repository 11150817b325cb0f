"""Weights files as they are on disk: known by their content when read, written as their makers write them.

A state is a dict of parameter name → tensor on the CPU. Nothing that a file contains is ever executed.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from engine.network.naming import OFFICIAL, PUBLISHED, TIMM, Naming, rename
from loaders.errors import UserError

ENTRIES = "model", "state_dict"
"""What the state dict is called in a training checkpoint: by the published code, and by timm."""


def read(path: Path) -> dict[str, Tensor]:
    """The state in a file, by the names of the published PyTorch code where it is a BiT network's, else by its own.

    UserError: another format, a damaged file, a pickle that asks for more than tensors.
    """
    return _from_timm(_reader(path)(path))


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
    try:
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
                torch.save(state if timm else {ENTRIES[0]: state}, file)
    except (safetensors.SafetensorError, RuntimeError) as error:  # what these libraries make of an OSError
        raise OSError(str(error).splitlines()[0]) from error


def _reader(path: Path) -> Callable[[Path], dict[str, Tensor]]:
    with path.open("rb") as file:
        start = file.read(9)
    with _parsing(path, "zip archive"):
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
        return archive.namelist()


@contextmanager
def _parsing(path: Path, what: str) -> Iterator[None]:
    """Around what a library does to a file: over damaged bytes, zipfile, NumPy and PyTorch raise nearly anything."""
    try:
        yield
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"{path} is refused: its pickle {f'asks for {wanted[1]}' if wanted else 'is damaged or asks for more'}, "
            "and only tensors and plain values are read, since anything else could run any code; where the file is "
            "trusted, save its state dict alone again, as safetensors"
        ) from error
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is a damaged {what} ({reason}); get it again") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _parsing(path, "safetensors file"):
        return safetensors.torch.load_file(path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    with _parsing(path, "PyTorch checkpoint"):
        content = torch.load(path, map_location="cpu", weights_only=True)
    entry = next((key for key in ENTRIES if key in content), None) if isinstance(content, dict) else None
    state = content if entry is None else content[entry]
    if not isinstance(state, dict) or not state or not all(_is_parameter(*item) for item in state.items()):
        found = f"a dict of {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state)
        raise UserError(f"{path} has {found}; expected a state dict, or one as the entry 'model' or 'state_dict'")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _is_parameter(name: object, value: object) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _read_npz(path: Path) -> dict[str, Tensor]:
    with _parsing(path, ".npz, or one with more than arrays"), np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    return {
        # TensorFlow keeps height, width, in, out
        _from_official(name, path): (array.permute(3, 2, 0, 1) if array.ndim == 4 else array).contiguous()
        for name, array in arrays.items()
    }


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
