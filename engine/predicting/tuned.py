"""A network that a run has trained, with all that its images need: read from the run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from engine.network import choose, weights
from engine.saving import checkpoint, places
from loaders.errors import UserError, reading
from loaders.pipelines import transform
from loaders.pipelines.transform import Transform

_NEEDED = ("network", "num_classes", "class_names", "several_labels", "transform", "precision")


@dataclass(frozen=True)
class Tuned:
    """A trained network, and what its checkpoint says."""

    network: nn.Module
    """In evaluation mode, in fp32, without gradients: images (b, 3, size, size), normalized → logits (b, k)."""
    path: Path
    """The checkpoint's folder."""
    about: dict[str, Any]
    """All that the checkpoint says of itself: `network`, the name of the architecture, `run`, `step`, …"""
    config: dict[str, Any]
    """The resolved configuration of the run; empty where the checkpoint lies elsewhere."""
    result: dict[str, Any]
    """The line that fine-tuning left of its score; empty where there is none."""
    names: tuple[str, ...]
    """Of the k classes or labels."""
    many: bool
    """Whether an image has several labels at once: then a sigmoid for each logit, else a softmax of all."""
    transform: Transform
    """From an image to what the network sees, as its scores were made: side, window, mean and std of each channel."""
    precision: str
    """What it was trained in: bf16, fp32, tf32, fp16."""
    checksum: str
    """SHA-256 of the file with the weights."""

    @property
    def size(self) -> int:
        """Side of the images that the network sees, pixels."""
        return self.transform.size


def load(run: str | Path, device: str | torch.device = "cpu") -> Tuned:
    """The network of a run: its folder, of which it is the one that was scored, or the folder of a checkpoint.

    UserError: there is none, it is damaged, or it was written before checkpoints said how images are prepared.
    """
    place = checkpoint.find(_scored(Path(run)))
    checkpoint.check_weights(place)
    about = checkpoint.describe(place)
    if missing := [key for key in _NEEDED if key not in about]:
        raise UserError(
            f"checkpoint {place} does not say its {', '.join(missing)}, as those of earlier versions: train with this "
            "version, or fine-tune from it"
        )
    file = place / checkpoint.WEIGHTS
    state = weights.load(file)
    with reading(place / checkpoint.ABOUT, "the description of a checkpoint"):
        prepared = transform.from_fields(about["transform"])
        with torch.random.fork_rng(devices=[]):  # whoever calls keeps their random numbers
            network = choose.build(about["network"], about["num_classes"], prepared.size)
        names = [str(name) for name in about["class_names"]]
        names += [f"output {i}" for i in range(len(names), about["num_classes"])]  # of a head with more of them
    weights.apply(network, state, new_head=False)
    network.to(device=device, memory_format=torch.channels_last).requires_grad_(False).eval()  # type: ignore[call-overload]
    return Tuned(
        network=network,
        path=place,
        about=about,
        config=_beside(place, "config.yaml"),
        result=_beside(place, "result.json"),
        names=tuple(names),
        many=bool(about["several_labels"]),
        transform=prepared,
        precision=str(about["precision"]),
        checksum=about["files"][checkpoint.WEIGHTS],
    )


def _scored(run: Path) -> Path:
    """The folder of the best checkpoint where the run's score is of that one."""
    best = run / "best"
    return best if _mapping(run / "config.yaml").get("keep_best") and places.complete(best) else run


def _beside(place: Path, name: str) -> dict[str, Any]:
    """What a run's folder has beside its checkpoints."""
    return _mapping(place.resolve().parents[1] / name)


def _mapping(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    with reading(file, "YAML"):
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}
