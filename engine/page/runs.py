"""What a run's folder says of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from engine.monitoring import metrics
from loaders.errors import UserError, check_regular, reading

METRICS, CONFIG, ENVIRONMENT = "metrics.jsonl", "config.yaml", "environment.json"


@dataclass(frozen=True)
class Run:
    """A pre-training or fine-tuning run."""

    name: str
    """Unlike the others' on the page."""
    folder: Path
    config: Mapping[str, str]
    """Dotted key → value as YAML."""
    environment: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]] = field(repr=False)
    """Of its metrics.jsonl, by step."""

    def points(self, kind: str, name: str) -> list[tuple[float, float]]:
        """(step, value) of the events of a kind ("train", "val") that have a value of this name."""
        return [(event["step"], event[name]) for event in self.events if event["kind"] == kind and name in event]

    @property
    def last_step(self) -> int:
        """Completed steps of which something is known."""
        return max((event["step"] for event in self.events), default=0)

    @property
    def command(self) -> str:
        """What repeats it."""
        words = [str(word) for word in self.environment.get("command", [])]
        if not words:
            return ""
        module = f"python -m engine.{words[0].removesuffix('.py')}" if words[0].endswith(".py") else words[0]
        return " ".join([module, *map(shlex.quote, words[1:])])


def is_one(place: Path) -> bool:
    """Whether a folder is that of a run."""
    return (place / METRICS).is_file()


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, named by as much of their paths as tells them apart.

    UserError where one has no metrics.jsonl, or its files are none that a run leaves.
    """
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read(folder: Path, name: str) -> Run:
    if not is_one(folder):
        raise UserError(f"{folder} has no {METRICS}; expected the folder of a run, which has {METRICS} and {CONFIG}")
    config: dict[str, str] = {}
    environment: Any = {}
    if (path := folder / CONFIG).exists():
        check_regular(path)
        with reading(path, "no configuration of a run"):
            _flatten(yaml.safe_load(path.read_text(encoding="utf-8")), "", config)
    if (path := folder / ENVIRONMENT).exists():
        check_regular(path)
        with reading(path, "no environment of a run"):
            environment = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(environment, dict) or not isinstance(environment.get("command", []), list):
                raise ValueError("a mapping expected, with a list of words as its command")
    return Run(name, folder, config, environment, metrics.read(folder / METRICS))


def _flatten(value: Any, prefix: str, found: dict[str, str]) -> None:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(inner, f"{prefix}.{key}" if prefix else str(key), found)
    elif prefix:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
        found[prefix] = text.removesuffix("...\n").strip()
    else:
        raise ValueError("a mapping expected")


def _names(folders: Sequence[Path]) -> list[str]:
    parts = [folder.absolute().parts for folder in folders]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(set(parts)):
        depth += 1
    names = ["/".join(each[-depth:]) for each in parts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice} is named twice; expected different runs")
    return names
