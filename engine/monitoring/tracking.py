"""A run's metrics in an experiment tracker of others, beside the files that every run leaves."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from loaders.errors import UserError

TRACKERS = ("none", "wandb", "trackio")
PROJECT = "boosterbit"
_LOG = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where metrics go, too. A tracker that fails is a warning, and is not asked again: training goes on."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One event, as of `MetricLog.write`."""

    def close(self) -> None:
        """The run has ended."""


def begin(name: str, folder: Path, title: str, config: Mapping[str, Any]) -> Tracker | None:
    """The tracker of a name of `TRACKERS`; None for "none". A run that goes on in its folder goes on there, too.

    wandb stays offline unless WANDB_MODE says otherwise, and both keep their files in the run's folder unless their
    own variables name another. UserError where the package is not installed, or does not begin.
    """
    if name == "none":
        return None
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when it is imported
    try:
        package = import_module(name)
    except ImportError as error:
        raise UserError(f"tracking={name}: it is not installed: pip install {name}; or tracking=none") from error
    try:
        if name == "wandb":
            return _Wandb(package, folder, title, config)
        return _Trackio(package, folder, title, config)
    except Exception as error:  # whatever theirs raise
        raise UserError(f"tracking={name} does not begin: {error}; or tracking=none") from error


class _Guarded:
    """Calls into a tracker, the first failure of which is the last call."""

    def __init__(self, name: str) -> None:
        self._name, self._broken = name, False

    def _try(self, call: Any, *words: Any, **named: Any) -> None:
        if self._broken:
            return
        try:
            call(*words, **named)
        except Exception as error:  # whatever theirs raise: a run of days must not end for it
            self._broken = True
            _LOG.warning("warning: %s takes no more metrics (%s); metrics.jsonl has them all", self._name, error)


class _Wandb(_Guarded):
    """Weights & Biases."""

    def __init__(self, package: Any, folder: Path, title: str, config: Mapping[str, Any]) -> None:
        super().__init__("wandb")
        identity = folder / "wandb-id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = package.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=title,
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(folder)),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(config),
        )

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._try(self._run.log, {f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._try(self._run.finish)


class _Trackio(_Guarded):
    """Trackio, whose data base lies in the run's folder."""

    def __init__(self, package: Any, folder: Path, title: str, config: Mapping[str, Any]) -> None:
        super().__init__("trackio")
        self._package = package
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        package.init(project=project, name=title, config=dict(config), resume="allow")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._try(self._package.log, {f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._try(self._package.finish)
