"""What a sweep file asks for: read, checked before anything runs, and multiplied out into single runs."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from engine.config import loading, typed
from engine.config.schema import AUTO, FinetuneConfig
from engine.network import family
from engine.transfer import fewshot
from engine.transfer.results import read as read_results
from loaders.arguments import expanded
from loaders.errors import UserError, check_regular, reading, shorten
from loaders.packs import agree

SWEEP_KEYS = ("name", "folder", "keep", "checkpoints", "shots", "seeds", "set", "targets")
KEEP = ("none", "best", "all")
TARGET_KEYS = ("recipe", "train", "test", "shots", "seeds", "checkpoints", "set")
DECIDED = {"from": "checkpoints", "source": "checkpoints", "shots": "shots", "seed": "seeds", "results": "folder",
           "folder": "folder", "data.train": "train", "data.test": "test", "data.name": "targets"}  # fmt: skip
"""Settings that a sweep has keys of its own for."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning run of a sweep."""

    target: str
    checkpoint: str
    shots: str
    seed: int
    config: FinetuneConfig

    @property
    def key(self) -> tuple:
        """What tells it from the other runs, as its line of results has it."""
        return self.target, self.checkpoint, self.shots, self.seed

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.checkpoint} → {self.target}, {fewshot.in_words(self.shots)}, seed {self.seed}"


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep file, in its order."""

    path: Path
    results: Path
    """The JSONL file to which each run appends a line."""
    runs: list[Run]
    keep: str = KEEP[0]
    """Whose networks are kept: those of all runs, of the best of each target, of none."""

    def prune(self) -> None:
        """Where only the best network of each target is kept, remove those of other runs that are done.

        Any of several processes may do so at any time: what is not the best among some never will be.
        """
        if self.keep != "best" or not self.results.exists():
            return
        values = {
            (found.dataset, found.source, found.shots, found.seed): found.value
            for found in read_results([self.results])
        }
        done = [run for run in self.runs if run.key in values]
        for target in {run.target for run in done}:
            runs = [run for run in done if run.target == target]
            best = max(runs, key=lambda run: -math.inf if math.isnan(values[run.key]) else values[run.key])
            for run in runs:
                if run is not best and run.config.folder:
                    shutil.rmtree(run.config.folder, ignore_errors=True)


def read(path: Path) -> Sweep:
    """The sweep of a YAML file (`python -m engine.sweep --help` shows one).

    Every run's settings, packs and shots are checked now. UserError: an unknown key (with the nearest), a missing
    one, a checkpoint or pack that is not there, packs of other classes, shots of a target with label vectors.
    """
    content = _mapping(path)
    _check_keys(content, SWEEP_KEYS, str(path))
    for key in ("name", "checkpoints", "targets"):
        if not content.get(key):
            raise UserError(f"{path} has no {key}: …; see python -m engine.sweep --help")
    checkpoints, targets = _section(content, "checkpoints", path), _section(content, "targets", path)
    places = {str(name): expanded(str(place)) for name, place in checkpoints.items()}
    absent = [f"{place} ({name})" for name, place in places.items() if place != "random" and not Path(place).exists()]
    if absent:
        raise UserError(f"{path}: there is no checkpoint {shorten(absent)}; take away what you do not have")
    folder = Path(expanded(str(content.get("folder") or f"runs/{content['name']}")))
    results = folder / "results.jsonl"
    keep = str(content.get("keep") or KEEP[0])
    if keep not in KEEP:
        raise UserError(f"{path}: keep: {keep}; expected {', '.join(KEEP)}")
    runs = []
    for name, target in targets.items():
        if not isinstance(target, Mapping):
            raise UserError(f"{path}: target {name} is {target!r}; expected keys such as train: … and test: …")
        _check_keys(target, TARGET_KEYS, f"{path}, target {name}")
        sweep = {key: value for key, value in content.items() if value is not None}
        sweep |= {"checkpoints": places, "keep": keep}
        runs += _runs(str(name), target, sweep, results, path)
    return Sweep(path, results, runs, keep)


def _runs(name: str, target: Mapping, sweep: Mapping, results: Path, path: Path) -> list[Run]:
    where = f"{path}, target {name}"
    for key in ("train", "test"):
        if not target.get(key):
            raise UserError(f"{where}: {key}: … is missing, the pack")
        if not all(isinstance(place, str) for place in _list(target[key])):
            raise UserError(f"{where}: {key} is {target[key]!r}; expected the file of a pack, or a list of such")
    chosen = {**sweep, **{key: value for key, value in target.items() if value is not None}}
    for key in ("shots", "seeds", "checkpoints"):
        if chosen.get(key) == []:
            raise UserError(f"{where}: {key} is an empty list, so nothing would run; take it away, or name one or more")
    shots = _distinct(str(each) for each in _list(chosen.get("shots", "full")))
    config = _config(name, target, sweep, results)
    _check_packs(config, shots, where)
    names = _distinct(str(each) for each in _list(chosen["checkpoints"]))
    for checkpoint in names:
        if checkpoint not in sweep["checkpoints"]:
            raise UserError(f"{where}: no checkpoint {checkpoint!r}; there are {shorten(list(sweep['checkpoints']))}")
        if config.model is None and str(sweep["checkpoints"][checkpoint]) == "random":
            raise UserError(f"{where}: random weights of which network? Say it under set:, as model: …")
    if config.model is not None:
        family.check(config.model)
    seeds = _list(chosen.get("seeds", [0, 1, 2, 3, 4]))
    if wrong := [seed for seed in seeds if not re.fullmatch("-?[0-9]{1,18}", str(seed))]:
        raise UserError(f"{where}: seeds: {wrong[0]} is not a whole number")
    seeds = _distinct(map(int, seeds))
    return [
        Run(name, checkpoint, each, seed, replace(
            config, from_=str(sweep["checkpoints"][checkpoint]), source=checkpoint, shots=each, seed=seed,
            folder=None if sweep["keep"] == "none" else str(_network(results.parent, (name, checkpoint, each, seed))),
        ))
        for checkpoint in names
        for each in shots
        for seed in seeds
    ]  # fmt: skip


def _network(folder: Path, key: tuple) -> Path:
    """Where a run of a sweep keeps its network: a name that people can read, and no other run of the sweep has."""
    target, *others = (re.sub(r"[^\w.+-]+", "_", str(part))[:60].lstrip(".") or "_" for part in key)
    return folder / "networks" / target / f"{'-'.join(others)}-{hashlib.sha256(repr(key).encode()).hexdigest()[:6]}"


def _config(name: str, target: Mapping, sweep: Mapping, results: Path) -> FinetuneConfig:
    """What the runs of a target have in common."""
    packs = {key: target[key] for key in ("train", "test")}
    folder = None if sweep["keep"] == "none" else AUTO  # each run has its own
    words = settings({"from": "random", "results": str(results), "folder": folder, "data": {"name": name, **packs}})
    for chosen, place in ((sweep.get("set") or {}, "set"), (target.get("set") or {}, f"targets.{name}.set")):
        if not isinstance(chosen, Mapping):
            raise UserError(f"{place} is {chosen!r}; expected settings of engine.finetune, such as lr: 0.003")
        more = settings(chosen)
        if taken := [key for key in (word.partition("=")[0] for word in more) if key in DECIDED]:
            raise UserError(f"{place} holds {taken[0]}, which a sweep sets itself; say it with {DECIDED[taken[0]]}: …")
        words += more
    return loading.load(FinetuneConfig, str(target.get("recipe") or name), words, "finetune")


def _check_packs(config: FinetuneConfig, shots: list[str], where: str) -> None:
    train = agree.open_train(config.data.train)
    test = agree.open_test(config.data.test, train)
    if train.labels.ndim > 1 and any(map(fewshot.per_class, shots)):
        raise UserError(
            f"{where}: shots: [{', '.join(shots)}], but {train.path} has several labels per image, so there are no "
            "images of one class to draw; say shots: full, or a share such as 10%"
        )
    agree.shared(train, test, ("train", "test"), config.data.overlap)


def settings(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A mapping of settings, nested as a recipe is, as `key=value` words."""
    words = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            words += settings(value, f"{prefix}{key}.")
        else:
            words.append(typed.as_word(f"{prefix}{key}", value))
    return words


def _mapping(path: Path) -> dict:
    try:
        check_regular(path)
        with reading(path, "YAML", "see python -m engine.sweep --help"):
            content = OmegaConf.to_container(
                OmegaConf.create(typed.read_as_typed(path.read_text(encoding="utf-8"))), resolve=True
            )
    except UserError as refused:
        error = refused.__cause__
        if not isinstance(error, InterpolationResolutionError):
            raise
        said = str(error).splitlines()[0].partition("resolving interpolation: ")[2] or error
        if str(error).startswith(UserError.__name__):  # of a name that is not read
            raise UserError(f"{path}: {said}") from error
        raise UserError(f"{path} names what is not there: {said}; set it, such as export RUNS=$SCRATCH/runs") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping of keys to values; see python -m engine.sweep --help")
    return content


def _section(content: Mapping, key: str, path: Path) -> Mapping:
    if not isinstance(content[key], Mapping):
        raise UserError(f"{path}: {key} is {content[key]!r}; expected a name and a value on each line")
    return content[key]


def _check_keys(content: Mapping, known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise UserError(f"{where}: unknown key {key}; the nearest known key is {near[0]}")


def _distinct(values: Iterable) -> list:
    """What is named twice runs once."""
    return list(dict.fromkeys(values))


def _list(value: Any) -> list:
    if isinstance(value, Mapping):
        return list(value)
    return list(value) if isinstance(value, list) else [value]
