"""The pack format: encoded images in HDF5, one file per shard. See docs/pack-format.md.

`loaders.packs.writer` streams records into it. A pack is ordinary HDF5 for any tool, but its arrays lie at known file
offsets, so they are read through a memory map: no copy, no library lock, safe over threads and forks.
"""

import bisect
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import UserError, told
from loaders.packs import index, superset
from loaders.packs.file import ShardFile
from loaders.packs.keys import Keys


def shard_paths(path: str | Path, count: int) -> list[Path]:
    """Names of the files of a pack: DEST.h5, or DEST-00000-of-00004.h5 and so on."""
    path = Path(path)
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k:05d}-of-{count:05d}{path.suffix}") for k in range(count)]


def existing_shards(path: str | Path) -> list[Path]:
    """Files on disk that a pack of this name would be read from or would replace."""
    path = Path(path)
    name = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}" + re.escape(path.suffix))
    with told(f"the folder {path.parent} cannot be read"):  # `glob` would say that it is empty
        found = sorted(filter(name.fullmatch, os.listdir(path.parent))) if path.parent.is_dir() else []
        return [each for each in [path] if each.is_file()] + [path.parent / each for each in found]


class Pack:
    """A packed dataset: one shard or several, read as one. Make it with `Pack.open`."""

    def __init__(self, shards: Sequence[ShardFile], path: Path, class_names: Sequence[str] | None = None):
        first = shards[0]
        self._shards = list(shards)
        self._starts = np.cumsum([0, *(len(s.keys) for s in shards)]).tolist()
        self.path: Path = path
        self.class_names: list[str] = list(first.class_names if class_names is None else class_names)
        columns = [superset.columns(s, self.class_names) for s in shards]
        self.labels: np.ndarray = _joined([_chosen(s.labels, c) for s, c in zip(shards, columns, strict=True)])
        self.sizes: np.ndarray = _joined([s.sizes for s in shards])
        self.groups: np.ndarray | None = None
        if any(s.groups is not None for s in shards):
            none = [np.full(len(s.keys), -1) if s.groups is None else s.groups for s in shards]
            self.groups = _joined(none)
        self.keys: Sequence[str] = Keys([s.keys for s in shards])
        self.class_counts: np.ndarray = np.sum([s.counts[c] for s, c in zip(shards, columns, strict=True)], axis=0)
        self.bits: int = max(s.attributes.get("bits", 8) for s in shards)
        """Bits per channel of the image that has most: 8 or 16."""
        self.attributes: dict = {**first.attributes, "records": len(self), "bits": self.bits}
        self.attributes.pop("shard", None)

    @classmethod
    def open(
        cls, path: str | Path | Sequence[str | Path], *, alone: bool = False, labels: Sequence[str] | None = None
    ) -> "Pack":
        """Map a pack: DEST.h5 (one file, or its set of shards), one shard, or a list of packs to be read as one.

        Of label vectors those that all packs have are kept, by name (see `superset.py`); `labels` asks for certain
        ones, in that order. Packs of one class per image must have the same classes.
        It reads the index and compares its checksum, but not the records (`verify` does).
        `alone` opens the file of that name only, without looking for the shards of its set.
        Raises UserError when missing, foreign, of a newer version, truncated, with shards missing, or where labels do
        not match.
        """
        if isinstance(path, str | Path):
            return cls(_open_set(Path(path), alone), Path(path), labels)
        if not path:
            raise UserError("no pack was named")
        superset.check_files(path)
        shards = [shard for p in path for shard in _open_set(Path(p), alone)]
        superset.check_distinct(shards)
        return cls(shards, shards[0].path, superset.common_labels(shards) if labels is None else labels)

    @property
    def image_bytes(self) -> int:
        """Bytes of all encoded images together."""
        return sum(int(shard.offsets[-1]) for shard in self._shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, ([s.path for s in self._shards], self.path, self.class_names))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def starts(self) -> tuple[int, ...]:
        """Record number at which each shard begins."""
        return tuple(self._starts[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded images."""
        return sum(shard.blob_span[1] for shard in self._shards)

    @property
    def parts(self) -> list[tuple[str, int, int]]:
        """Name of each pack that this was opened from, its first record, and the one after its last."""
        return superset.parts(self._shards)

    def record(self, i: int) -> np.ndarray:
        """The encoded image i as uint8 (bytes,): a view of the memory map, not a copy. IndexError out of range."""
        shard, j = self._find(i)
        return shard.blob[int(shard.offsets[j]) : int(shard.offsets[j + 1])]

    def _find(self, i: int) -> tuple[ShardFile, int]:
        i = range(len(self))[i]
        k = bisect.bisect_right(self._starts, i) - 1
        return self._shards[k], i - self._starts[k]

    def records(self, ids: np.ndarray) -> list[np.ndarray]:
        """`record` of each of ids (b,) int64, in less time per record."""
        if len(self._shards) > 1:
            return [self.record(i) for i in ids.tolist()]
        shard = self._shards[0]
        spans = zip(shard.offsets[ids].tolist(), shard.offsets[ids + 1].tolist(), strict=True)
        blob = shard.blob
        return [blob[start:stop] for start, stop in spans]

    def check_files(self, ids: np.ndarray) -> None:
        """UserError where a file that holds one of these records (b,) int64 was replaced, cut off or removed since it
        was opened. It costs a look at each file's size, and does not read."""
        for k in np.unique(np.searchsorted(self._starts, ids, side="right") - 1).tolist():
            self._shards[k].check_same()

    def unsound(self, ids: np.ndarray) -> list[int]:
        """Of these records (b,) int64, those whose bytes do not match their checksum, each once."""
        places = [(i, *self._find(i)) for i in dict.fromkeys(ids.tolist())]
        return [i for i, shard, j in places if not shard.sound(j)]

    @property
    def fingerprints(self) -> np.ndarray:
        """(n,) uint64 of each record: equal for equal bytes, and hardly ever for others (checksum and length)."""
        sizes = [np.diff(shard.offsets).astype(np.uint64) & np.uint64(2**32 - 1) for shard in self._shards]
        sums = [shard.crc32.astype(np.uint64) << np.uint64(32) for shard in self._shards]
        return _joined(sums) | _joined(sizes)

    def verify(self, progress: Callable[[int], object] = lambda records: None) -> list[str]:
        """Check every record and every index against its checksum; a line for each fault, none when sound.

        `progress` is called with the number of records done since its last call.
        """
        return [
            fault
            for shard, first in zip(self._shards, self._starts, strict=False)
            for fault in shard.faults(first, progress)
        ]


def _reopen(shards: list[Path], path: Path, class_names: list[str]) -> Pack:
    return Pack([ShardFile(p) for p in shards], path, class_names)


def _chosen(labels: np.ndarray, columns: slice | list[int]) -> np.ndarray:
    return labels if isinstance(columns, slice) else labels[:, columns]


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _open_set(path: Path, alone: bool) -> list[ShardFile]:
    with told(f"the pack {path} cannot be read"):
        shards = _files(path, alone)
        for shard in shards:
            index.check(shard)
        return shards


def _files(path: Path, alone: bool) -> list[ShardFile]:
    if alone or path.exists():
        return [ShardFile(path)]
    found = [p for p in existing_shards(path) if p != path]
    if not found:
        return [ShardFile(path)]
    count = int(found[0].stem.rsplit("-", 1)[1])
    wanted = shard_paths(path, count)
    missing = [p.name for p in wanted if p not in found]
    if missing:
        raise UserError(
            f"{path} is a set of {count} shards of which {len(missing)} are missing: {', '.join(missing)};"
            " copy them here, or pack it again"
        )
    shards = [ShardFile(p) for p in wanted]
    strange = [s.path.name for s in shards if s.attributes.get("set") != shards[0].attributes.get("set")]
    if strange:
        raise UserError(f"{path}: {', '.join(strange)} come from another packing than {shards[0].path.name}")
    return shards
