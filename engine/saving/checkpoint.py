"""Checkpoints: weights as safetensors, the rest as tensors that load with `weights_only=True`, and a description.

    RUN/checkpoints/step-00001000/weights.safetensors   parameters by their published names, fp32
                                  state.pt              optimizer, loss scaler, step
                                  about.json            network, classes, step, images seen, SHA-256 of all three

A checkpoint is written to a temporary folder, synced, and renamed: a folder with the right name was whole. Whether it
still is, its checksums say: a run goes on from the newest checkpoint that is sound.

    RUN/checkpoints/diverged-00001000/    the same of weights that are no numbers any more, and diagnosis.json

is for people: nothing goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.network.weights import FOLDER_FILE
from engine.saving.places import DIAGNOSIS, complete, diverged, step_of, tidy
from engine.whole import json_text, may_wait, sync_folder, system_speaks
from loaders.errors import SystemRefusal, UserError, in_words, is_passing

WEIGHTS, STATE, ABOUT = FOLDER_FILE, "state.pt", "about.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds."""

    path: Path
    weights: dict[str, torch.Tensor]  # parameter name → fp32 tensor, on the CPU
    state: dict[str, Any]  # "optimizer", "scaler", "step"
    about: dict[str, Any]  # "network", "num_classes", "class_names", "step", …


Weights = Mapping[str, torch.Tensor]
"""What a checkpoint keeps of a network: its state dict."""


def save(folder: Path, weights: Weights, state: Mapping[str, Any], about: Mapping[str, Any], keep: int | None) -> Path:
    """Write a checkpoint for `state["step"]` completed steps below `folder`, and remove all but the newest `keep`, or
    all others (None).

    An OSError (disk full, quota) leaves the older checkpoints as they were.
    """
    final = folder / f"step-{state['step']:08d}"
    temporary = _write(final, weights, state, {ABOUT: about})
    replaced = folder / f".{final.name}.replaced"
    if final.exists():  # it has a name all the time, and `tidy` gives it back its own where a kill comes in between
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    there = complete(folder)
    for old in there[:-keep] if keep else [path for path in there if path != final]:
        shutil.rmtree(old)
    return final


def save_or_warn(
    folder: Path, weights: Weights, state: Mapping[str, Any], about: Mapping[str, Any], keep: int | None, then: str
) -> bool:
    """`save`; False where the disk is full, with a warning that says what happens `then`, and nothing of it stays."""
    written = False
    with may_wait(folder, then):
        save(folder, weights, state, about, keep)
        written = True
    if not written:
        tidy(folder)
    return written


def set_beside(
    folder: Path, weights: Weights, state: Mapping[str, Any], about: Mapping[str, Any], diagnosis: Mapping[str, Any]
) -> Path:
    """Write what `save` would not, for people to look at, under a name that no run goes on from; only one is kept.

    diagnosis: what was found, for JSON. OSError as for `save`.
    """
    final = folder / f"diverged-{state['step']:08d}"
    temporary = _write(final, weights, state, {ABOUT: about, DIAGNOSIS: diagnosis})
    for old in diverged(folder):
        shutil.rmtree(old)
    temporary.rename(final)
    sync_folder(folder)
    return final


def _write(final: Path, weights: Weights, state: Mapping[str, Any], said: Mapping[str, Mapping[str, Any]]) -> Path:
    """A synced temporary folder beside `final`; `said`: JSON files by name."""
    temporary = final.with_name(f".{final.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with system_speaks(temporary / WEIGHTS):
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, temporary / WEIGHTS)
    with system_speaks(temporary / STATE), open(temporary / STATE, "wb") as out:  # torch itself would not say why
        torch.save(dict(state), out)
    files = {name: _sha256(temporary / name) for name in (WEIGHTS, STATE)}
    for name, values in said.items():
        if name == ABOUT:  # sealed as it will be read
            values = _sealed({**json.loads(json_text(values)), "files": files})
        (temporary / name).write_text(json_text(values, indent=1) + "\n", encoding="utf-8")
    (temporary / WEIGHTS).chmod((temporary / ABOUT).stat().st_mode)  # safetensors lets nobody else read its files
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(temporary)
    return temporary


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(about: Mapping[str, Any]) -> dict[str, Any]:
    """A description, and the checksum of what it says."""
    said = {name: value for name, value in about.items() if name != "sha256"}
    return said | {"sha256": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers in some tensors of one device are finite. One reduction there, and one wait for it."""
    extremes = [extreme for tensor in tensors if tensor.numel() for extreme in torch.aminmax(tensor)]  # NaN wins
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def newest_sound(folder: Path, mine: Mapping[str, Any]) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest sound checkpoint below `folder`, and the newer ones with what is wrong with each.

    mine: what the run says of itself. UserError where a sound checkpoint is of another run, or where there are
    checkpoints and none is sound.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(complete(folder)):
        try:
            agree(_described(path), mine, path)
            return _load(path, named=True), damaged
        except _Damaged as error:
            damaged.append((path, str(error)))
    if damaged:
        said = "; ".join(f"{path.name}: {reason}" for path, reason in damaged)
        raise UserError(f"{folder} holds no sound checkpoint ({said}); choose another folder=… to start anew")
    return None, []


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
    """The description of the checkpoint folder `path`, without its tensors. UserError where it is damaged."""
    with _told(path):
        return _described(path)


def load(path: Path) -> Checkpoint:
    """Read the checkpoint folder `path`. UserError where a file is missing, truncated, or not what it should be."""
    with _told(path):
        return _load(path)


def check_weights(path: Path) -> None:
    """UserError unless the weights of the checkpoint folder `path` are what was written."""
    with _told(path):
        _compare(path, _described(path), WEIGHTS)


class _Damaged(Exception):
    """What is wrong with a checkpoint."""


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except _Damaged as error:
        others = [other for other in complete(path.parent) if other != path]
        advice = f"there is {others[-1]} too" if others else "copy it again"
        raise UserError(f"checkpoint {path} is damaged: {error}; {advice}") from error


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What keeps a file from being read is damage where it is the file's; what is the machine's sets nothing aside."""
    if file.exists() and not file.is_file():  # a pipe would never end
        raise _Damaged(f"{file.name} is no file")
    try:
        yield
    except OSError as error:
        if is_passing(error) or isinstance(error, PermissionError):
            raise SystemRefusal(f"checkpoint {file} cannot be read: {in_words(error, str(file))}") from error
        raise _Damaged(f"{file.name} cannot be read ({in_words(error, str(file))})") from error


def _described(path: Path) -> dict[str, Any]:
    with _reading(path / ABOUT):
        content = (path / ABOUT).read_bytes()
    try:
        about = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"{ABOUT} cannot be read ({error})") from error
    if not isinstance(about, dict):
        raise _Damaged(f"{ABOUT} is no description: it holds {_short(about)}")
    if ("sha256" in about) != ("files" in about) or ("files" in about and _sealed(about) != about):
        raise _Damaged(f"{ABOUT} does not match its checksum")  # older ones have neither
    return about


def _compare(path: Path, about: Mapping[str, Any], name: str) -> None:
    with _reading(path / name):
        if "files" in about and _sha256(path / name) != about["files"].get(name):
            raise _Damaged(f"{name} does not match its checksum")


def _load(path: Path, named: bool = False) -> Checkpoint:
    """`named`: the folder's name has to tell the step."""
    about = _described(path)
    for name in (WEIGHTS, STATE):
        _compare(path, about, name)
    try:
        with _reading(path / WEIGHTS):
            weights = load_file(path / WEIGHTS)
        with _reading(path / STATE):
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (_Damaged, SystemRefusal):
        raise
    except Exception as error:  # the parsers raise whatever the broken bytes lead them to
        raise _Damaged(f"it cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise _Damaged(f"{STATE} names no step")
    steps = [state["step"], about.get("step", state["step"]), step_of(path) if named else state["step"]]
    if any(step != steps[0] for step in steps):
        raise _Damaged(f"{STATE}, {ABOUT} and its name are of steps {steps[0]}, {steps[1]} and {steps[2]}")
    if not finite(value for value in weights.values() if value.is_floating_point()):
        raise _Damaged(f"{WEIGHTS} holds numbers that are not finite")
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
