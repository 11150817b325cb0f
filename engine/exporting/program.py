"""A network as a program of torch.export (.pt2), which torch runs without this project."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engine.exporting.deployed import INPUT, Deployed
from engine.exporting.facts import Facts
from engine.whole import json_text

FILE = "model.pt2"
FACTS = "facts.json"
"""The file inside it that holds `Facts.metadata`."""
Runs = Callable[[Tensor], tuple[Tensor, Tensor]]


def traced(deployed: Deployed, size: int) -> torch.export.ExportedProgram:
    """The program of a network, for any number of images of `size` pixels a side."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(deployed, (torch.zeros(2, 3, size, size),), dynamic_shapes={INPUT: {0: batch}})


def write(program: torch.export.ExportedProgram, facts: Facts, folder: Path) -> Path:
    """Write it into a folder; the file."""
    torch.export.save(program, folder / FILE, extra_files={FACTS: json_text(facts.metadata(), indent=1)})
    return folder / FILE


def read(file: Path) -> Runs:
    """What `write` wrote, ready to run."""
    module = torch.export.load(file).module()
    return lambda images: module(images)
