"""The names that a BiT network's parameters have in the published PyTorch code (and here), in the official `.npz`
files, and in timm. Needs no torch.

One table says it for all three; kernels are laid out alike but in the `.npz` (`engine/network/formats.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD = "head.conv."
"""What the names of the classifier's parameters start with, here."""

WORDS = {"safetensors": "safetensors", "pth": "published layout", "npz": "official .npz", "timm": "timm's names"}
"""What `--to` takes → what it is, for people."""


@dataclass(frozen=True)
class Naming:
    """The names that one code base gives the parameters."""

    unit: str
    """What comes before a part of a unit, with the fields `block` and `unit`."""
    first: int
    """Number of the first block, and of the first unit of a block."""
    digits: int
    """Digits that the number of a unit has at least."""
    parts: tuple[str, ...]
    """The parameters of a unit, in an order that all namings share."""
    others: tuple[str, ...]
    """Those outside of units: root, last norm, classifier; likewise."""

    def parse(self, name: str) -> tuple[int, int, int] | None:
        """Block and unit, from 0, and index in `parts`; (-1, -1, index in `others`); None for another name."""
        if name in self.others:
            return -1, -1, self.others.index(name)
        number = r"(\d{1,4})"
        pattern = re.escape(self.unit).replace(r"\{block\}", number).replace(r"\{unit\}", number)
        found = re.fullmatch(pattern + "(.+)", name, re.ASCII)
        if found is None or found[3] not in self.parts:
            return None
        place = int(found[1]) - self.first, int(found[2]) - self.first, self.parts.index(found[3])
        return place if self.form(*place) == name else None

    def form(self, block: int, unit: int, index: int) -> str:
        """The inverse of `parse`."""
        if block < 0:
            return self.others[index]
        number = f"{unit + self.first:0{self.digits}d}"
        return self.unit.format(block=block + self.first, unit=number) + self.parts[index]


def _parts(layer: str, layers: str, projection: str) -> tuple[str, ...]:
    """Gain, shift and kernel of each of a unit's layers, and the kernel of its projection."""
    return (*(name.format(i) for i in layers for name in layer.split()), projection)


PUBLISHED = Naming(
    unit="body.block{block}.unit{unit}.",
    first=1,
    digits=2,
    parts=_parts("gn{}.weight gn{}.bias conv{}.weight", "123", "downsample.weight"),
    others=("root.conv.weight", "head.gn.weight", "head.gn.bias", "head.conv.weight", "head.conv.bias"),
)
"""The published PyTorch code and `engine.network.bit`: `body.block1.unit01.gn1.weight`."""

OFFICIAL = Naming(
    unit="resnet/block{block}/unit{unit}/",
    first=1,
    digits=2,
    parts=_parts(
        "{}/group_norm/gamma {}/group_norm/beta {}/standardized_conv2d/kernel",
        "abc",
        "a/proj/standardized_conv2d/kernel",
    ),
    others=(
        "resnet/root_block/standardized_conv2d/kernel",
        "resnet/group_norm/gamma",
        "resnet/group_norm/beta",
        "resnet/head/conv2d/kernel",
        "resnet/head/conv2d/bias",
    ),
)
"""The official files of BiT: `resnet/block1/unit01/a/group_norm/gamma`."""

TIMM = Naming(
    unit="stages.{block}.blocks.{unit}.",
    first=0,
    digits=1,
    parts=_parts("norm{}.weight norm{}.bias conv{}.weight", "123", "downsample.conv.weight"),
    others=("stem.conv.weight", "norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"),
)
"""timm's `resnetv2_…_bit`: `stages.0.blocks.0.norm1.weight`."""


def rename(name: str, source: Naming, target: Naming) -> str | None:
    """What `target` calls the parameter that `source` calls `name`; None for a name that `source` has not."""
    place = source.parse(name)
    return None if place is None else target.form(*place)


def timm_network(member: str) -> str | None:
    """timm's name of a member of `engine.network.family`, `R50x1` → `resnetv2_50x1_bit`; None for our own small ones,
    which timm has not."""
    published = re.fullmatch(r"R(\d+x\d)", member)
    return f"resnetv2_{published[1]}_bit" if published else None
