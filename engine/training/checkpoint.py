"""Checkpoints: weights as safetensors, the rest as tensors that load with `weights_only=True`, and a description.

    RUN/checkpoints/step-00001000/weights.safetensors   parameters by their published names, fp32
                                  state.pt              optimizer, loss scaler, step
                                  about.json            network, classes, step, images seen

A checkpoint is written to a temporary folder, synced, and renamed: a folder with the right name is whole.

    RUN/checkpoints/diverged-00001000/    the same of weights that are no numbers any more, and diagnosis.json

is for people: nothing goes on from it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from engine.network.weights import FOLDER_FILE
from loaders.errors import UserError

WEIGHTS, STATE, ABOUT, DIAGNOSIS = FOLDER_FILE, "state.pt", "about.json", "diagnosis.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    path: Path
    weights: dict[str, torch.Tensor]  # parameter name → fp32 tensor, on the CPU
    state: dict[str, Any]  # "optimizer", "scaler", "step"
    about: dict[str, Any]  # "network", "num_classes", "class_names", "step", …


def save(
    folder: Path,
    model: nn.Module,
    state: Mapping[str, Any],
    about: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint for `state["step"]` completed steps below `folder`, and remove all but the newest `keep`.

    An OSError (disk full, quota) leaves the older checkpoints as they were.
    """
    final = folder / f"step-{state['step']:08d}"
    temporary = _write(final, model, state, {ABOUT: about})
    if final.exists():  # the same step of a run that was resumed from before it
        shutil.rmtree(final)
    temporary.rename(final)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def set_beside(
    folder: Path, model: nn.Module, state: Mapping[str, Any], about: Mapping[str, Any], diagnosis: Mapping[str, Any]
) -> Path:
    """Write what `save` would not, for people to look at, under a name that no run goes on from; only one is kept.

    diagnosis: what was found, for JSON. OSError as for `save`.
    """
    final = folder / f"diverged-{state['step']:08d}"
    temporary = _write(final, model, state, {ABOUT: about, DIAGNOSIS: diagnosis})
    for old in folder.glob("diverged-*"):
        if (old / DIAGNOSIS).is_file():
            shutil.rmtree(old)
    temporary.rename(final)
    return final


def _write(final: Path, model: nn.Module, state: Mapping[str, Any], said: Mapping[str, Mapping[str, Any]]) -> Path:
    """A synced temporary folder beside `final`; `said`: JSON files by name."""
    temporary = final.with_name(f".{final.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, temporary / WEIGHTS)
    torch.save(dict(state), temporary / STATE)
    for name, values in said.items():
        (temporary / name).write_text(json.dumps(dict(values), indent=1) + "\n")
    (temporary / WEIGHTS).chmod((temporary / ABOUT).stat().st_mode)  # safetensors lets nobody else read its files
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return temporary


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers in some tensors of one device are finite. One reduction there, and one wait for it."""
    extremes = [extreme for tensor in tensors if tensor.numel() for extreme in torch.aminmax(tensor)]  # NaN wins
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def complete(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / ABOUT).is_file())


def find(place: str | Path) -> Path:
    """The checkpoint meant by `place`: a checkpoint folder, or the newest one of a run folder. UserError if none."""
    place = Path(place)
    if not place.exists():
        raise UserError(f"checkpoint {place} does not exist; give a run folder, a checkpoint folder, or a weights file")
    if (place / ABOUT).is_file():
        return place
    for folder in (place / "checkpoints", place):
        if found := complete(folder):
            return found[-1]
    raise UserError(f"{place} holds no checkpoint: neither {ABOUT} nor checkpoints/step-… folders are in it")


def describe(path: Path) -> dict[str, Any]:
    """The description of the checkpoint folder `path`, without its tensors."""
    try:
        return json.loads((path / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path / ABOUT} cannot be read ({error}); remove {path} to go on from an older one") from error


def load(path: Path) -> Checkpoint:
    """Read the checkpoint folder `path`. UserError where a file is missing, truncated, or not what it should be."""
    about = describe(path)
    try:
        weights = load_file(path / WEIGHTS)
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint {path} is damaged ({reason}); remove it to go on from an older one") from error
    return Checkpoint(path, weights, state, about)


def agree(checkpoint: Mapping[str, Any], mine: Mapping[str, Any], path: Path) -> None:
    """UserError unless a checkpoint is of the same network, classes and batch as the run that would go on from it.

    Progress is counted in steps, so with another global batch the samples seen and the schedule would be others.
    """
    for key in ("network", "num_classes", "class_names", "global_batch", "settings"):
        found, expected = checkpoint.get(key), mine.get(key)
        if found != expected:
            raise UserError(
                f"{path} is of another run: its {key} is {_short(found)}, here it is {_short(expected)}; "
                "choose another folder=…, or give the same recipe, packs and batch"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "…"
