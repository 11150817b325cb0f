"""Streams records into pack files: written under a temporary name, read back, then renamed."""

import contextlib
import os
import shutil
import uuid
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import numpy as np

from loaders.packs.hdf5 import index_checksum, write_file
from loaders.packs.shard import Pack
from loaders.sources.images import bits_per_channel
from loaders.sources.listing import UNKNOWN

_CHUNK = 1 << 24  # bytes copied at a time


@dataclass(frozen=True)
class Record:
    """One sample on its way into a pack."""

    data: bytes
    """The encoded image."""
    key: str
    """Unique name of the sample, usually its path in the source."""
    label: int | Sequence[float]
    """Class number, -1 where there is none, or one number per label with NaN for unknown."""
    height: int
    """Pixels, as displayed (EXIF orientation applied)."""
    width: int
    """Pixels, as displayed."""
    group: int = -1
    """Samples of one group (a patient) must not be split between training and test; -1 for none."""


class ShardWriter:
    """Streams records to one shard under a temporary name; memory grows only by the index.

    Use as a context manager: whatever is not published when the block ends is removed.
    """

    def __init__(self, path: str | Path, class_names: Sequence[str], attributes: dict):
        self.path = Path(path)
        self._names = list(class_names)
        self._attributes = attributes
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        self._bytes = self.path.with_name(f".{self.path.name}.bytes")
        self._blob = open(self._bytes, "w+b")  # noqa: SIM115  closed by finish or __exit__
        self._offsets, self._crc, self._sizes = array("q", [0]), array("I"), array("i")
        self._keys: list[bytes] = []
        self._labels: array | list = array("q")
        self._groups = array("q")
        self._bits = 8

    def add(self, record: Record) -> None:
        self._blob.write(record.data)
        self._offsets.append(self._offsets[-1] + len(record.data))
        self._crc.append(zlib.crc32(record.data))
        self._bits = max(self._bits, bits_per_channel(record.data))
        self._sizes.extend((record.height, record.width))
        self._keys.append(record.key.encode())
        if not isinstance(record.label, int) and not self._labels:
            self._labels = []
        self._labels.append(record.label)
        self._groups.append(record.group)

    def __len__(self) -> int:
        return len(self._keys)

    def _label_array(self) -> np.ndarray:
        if not self._labels or np.ndim(self._labels[0]) == 0:
            return np.array(self._labels, dtype=np.int64)
        return np.array(self._labels, dtype=np.float32)

    def finish(self, attributes: dict | None = None) -> None:
        """Write the HDF5 file under its temporary name, with further `attributes`, and read every record back."""
        labels = self._label_array()
        arrays: dict[str, np.ndarray] = {
            "images/offsets": np.array(self._offsets, dtype=np.int64),
            "images/sizes": np.array(self._sizes, dtype=np.int32).reshape(-1, 2),
            "images/crc32": np.array(self._crc, dtype=np.uint32),
            "labels": labels,
            "keys": _strings(self._keys),
            "classes/names": _strings([name.encode() for name in self._names]),
            "classes/counts": count_labels(labels, len(self._names)),
        }
        if any(group != -1 for group in self._groups):
            arrays["groups"] = np.array(self._groups, dtype=np.int64)
        length = self._offsets[-1]
        facts = {**self._attributes, **(attributes or {}), "records": len(self), "bits": self._bits}
        at, sum_at = write_file(self._partial, length, arrays, facts)
        self._blob.seek(0)
        with open(self._partial, "r+b") as out:
            out.seek(at)
            shutil.copyfileobj(self._blob, out, _CHUNK)
        checksum = index_checksum(self._partial, (at, length), sum_at)
        with open(self._partial, "r+b") as out:
            out.seek(sum_at)
            out.write(checksum.to_bytes(4, "little"))
            out.flush()
            os.fsync(out.fileno())
        self._blob.close()
        self._bytes.unlink()
        faults = Pack.open(self._partial, alone=True).verify()
        if faults:
            raise OSError(f"{self.path}: what was written does not read back: {faults[0]}")

    def stage(self) -> None:
        """Keep the finished file, verified, until the other shards are finished too."""
        os.replace(self._partial, staged_path(self.path))

    def publish(self) -> None:
        """Give the finished file its name."""
        os.replace(self._partial, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):  # on a full disk, of what is thrown away here
            self._blob.close()
        for leftover in (self._bytes, self._partial):
            leftover.unlink(missing_ok=True)


def staged_path(path: Path) -> Path:
    """Where a finished shard waits for the others of its pack."""
    return path.with_name(f".{path.name}.done")


def _strings(values: list[bytes]) -> np.ndarray:
    return np.array(values, dtype=f"S{max((len(v) for v in values), default=0) or 1}")


def count_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Samples per class, (classes,) int64; of float labels the number that are positive."""
    if labels.ndim == 1:
        return np.bincount(labels[labels != UNKNOWN], minlength=classes).astype("<i8")
    return (np.nan_to_num(labels) > 0).sum(0).astype("<i8")


def new_attributes(common: dict, shards: int) -> list[dict]:
    """The attributes of each shard of a new pack; the random `set` ties its shards together."""
    common = {
        **common,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "set": uuid.uuid4().hex,
        "shards": shards,
    }
    return [{**common, "shard": k} for k in range(shards)]
