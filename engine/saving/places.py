"""Where checkpoints lie and what their folders are called: all that can be known of them without reading one."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path

from loaders.errors import told

DIAGNOSIS = "diagnosis.json"
_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.((?:step|diverged)-\d{8,})\.(writing|replaced)")


def complete(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first. Other names than ours are nobody's business here."""
    with told(f"the checkpoints in {folder} cannot be listed"):  # `glob` would say there are none
        names = os.listdir(folder) if folder.is_dir() else []
    found = [(int(name[1]), folder / name[0]) for name in map(_NAME.fullmatch, names) if name]
    return [path for _, path in sorted(found) if path.is_dir() and not path.is_symlink()]


def step_of(path: Path) -> int:
    """Completed steps of a checkpoint, as its name says."""
    return int(path.name.removeprefix("step-"))


def diverged(folder: Path) -> list[Path]:
    """What was set beside the checkpoints below `folder`, since it is no number any more."""
    return [path for path in folder.glob("diverged-*") if (path / DIAGNOSIS).is_file()]


def tidy(folder: Path) -> None:
    """Remove what saves that were killed have left below `folder`; what was to be replaced, and was not, comes back."""
    for path in folder.glob(".*"):
        name = _LEFTOVER.fullmatch(path.name)
        if name and name[2] == "replaced" and not (folder / name[1]).exists():
            path.rename(folder / name[1])
        elif name:
            shutil.rmtree(path)


def set_aside(damaged: Path) -> Path:
    """Give a damaged checkpoint a name that nothing takes it by, for people to look at; the new name."""
    number = next(n for n in itertools.count() if not damaged.with_name(f"damaged-{n}-{damaged.name}").exists())
    return damaged.rename(damaged.with_name(f"damaged-{number}-{damaged.name}"))
