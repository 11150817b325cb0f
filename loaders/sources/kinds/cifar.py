"""CIFAR-10 and CIFAR-100 in their binary version: https://www.cs.toronto.edu/~kriz/cifar.html."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from loaders.errors import UserError
from loaders.sources.listing import Listing, TableBuilder

KIND = "cifar"
HELP = "a folder cifar-10-batches-bin or cifar-100-binary; --under train or test takes a part"
_PIXELS = 3 * 32 * 32
_FILES = {
    "cifar-10": {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]},
    "cifar-100": {"train": ["train.bin"], "test": ["test.bin"]},
}
_NAMES = {"cifar-10": "batches.meta.txt", "cifar-100": "fine_label_names.txt"}
_LABEL_BYTES = {"cifar-10": 1, "cifar-100": 2}  # CIFAR-100: superclass, class


@dataclass(frozen=True)
class CifarImage:
    """One picture of a binary file, encoded as PNG when read."""

    path: str
    """The .bin file."""
    offset: int
    """Where its 3,072 bytes begin: the red plane, then green, then blue."""

    def read(self) -> bytes:
        planes = np.fromfile(self.path, np.uint8, _PIXELS, offset=self.offset).reshape(3, 32, 32)
        buffer = BytesIO()
        Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))).save(buffer, "PNG")
        return buffer.getvalue()


def cifar_image(place: str, key: str, offset: int, size: int) -> CifarImage:
    """Reader of the picture at `offset`."""
    return CifarImage(place, offset)


def _version(source: str) -> str | None:
    for version, parts in _FILES.items():
        if any(Path(source, name).is_file() for names in parts.values() for name in names):
            return version
    return None


def accepts(source: str) -> bool:
    return _version(source) is not None


def listing(source: str, under: str | None = None) -> Listing:
    version = _version(source)
    if version is None:
        raise UserError(f"{source} is not the binary version of CIFAR: expected {HELP}")
    parts = _FILES[version]
    if under and under not in parts:
        raise UserError(f"CIFAR has no part {under!r}; --under may be {' or '.join(parts)}")
    names = _class_names(Path(source, _NAMES[version]))
    builder = TableBuilder(cifar_image)
    for part in [under] if under else parts:
        number = 0
        for path in (Path(source, name) for name in parts[part]):
            for label, offset in _records(path, _LABEL_BYTES[version], len(names)):
                builder.add(f"{part}/{number:05d}.png", label, str(path), offset)
                number += 1
    return Listing(builder.table(), names)


def _class_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(f"{path} is missing; it comes with CIFAR's binary version and names the classes")
    return tuple(
        line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    )


def _records(path: Path, label_bytes: int, classes: int) -> list[tuple[int, int]]:
    if not path.is_file():
        raise UserError(f"{path} is missing; download CIFAR's binary version again")
    record = label_bytes + _PIXELS
    data = np.fromfile(path, np.uint8)
    if not len(data) or len(data) % record:
        raise UserError(f"{path} has {len(data):,} bytes, no multiple of {record:,}: truncated? Download it again")
    labels = data.reshape(-1, record)[:, label_bytes - 1]
    if labels.max() >= classes:
        raise UserError(f"{path} holds label {labels.max()}, but only {classes} classes are named")
    return [(label, i * record + label_bytes) for i, label in enumerate(labels.tolist())]
