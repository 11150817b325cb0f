"""The pack format: encoded images in HDF5, one file per shard. See docs/pack-format.md.

`loaders.packs.writer` streams records into it. A pack is ordinary HDF5 for any tool, but its arrays lie at known file
offsets, so they are read through a memory map: no copy, no library lock, safe over threads and forks.
"""

import bisect
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from loaders.errors import UserError
from loaders.packs import index, superset
from loaders.packs.hdf5 import FORMAT, VERSION, Hdf5Blob
from loaders.packs.keys import Keys

_ARRAYS = ("images/bytes", "images/offsets", "images/sizes", "images/crc32", "labels", "keys")


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
    found = [p for p in path.parent.glob("*") if name.fullmatch(p.name)] if path.parent.is_dir() else []
    return ([path] if path.is_file() else []) + sorted(found)


class _Shard:
    """One file, its arrays as views of one memory map."""

    def __init__(self, path: Path):
        self.path = path
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise UserError(_unreadable(path, error)) from error
        try:
            with file:
                self._read(file)
        except UserError:
            raise
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:  # what HDF5 says of damage varies
            raise UserError(
                f"{path} is damaged, its structure is unreadable ({error}); copy or pack it again"
            ) from error

    def _read(self, file: h5py.File) -> None:
        self.attributes = {name: _plain(value) for name, value in file.attrs.items()}
        self._check_format()
        names = [*_ARRAYS, *(n for n in ("groups",) if n in file), "classes/names", "classes/counts"]
        absent = [n for n in names if n not in file]
        if absent:
            raise UserError(f"{self.path} is damaged: it lacks {', '.join(absent)}; pack it again")
        size = self.path.stat().st_size
        whole = np.asarray(np.memmap(self.path, np.uint8, "r"))
        arrays: dict[str, np.ndarray] = {}
        stored: Hdf5Blob | None = None
        for name in names:
            dataset = file[name]
            at, length = dataset.id.get_offset(), dataset.size * dataset.dtype.itemsize
            if at is None or not length:
                if name == "images/bytes" and dataset.size:
                    stored = Hdf5Blob(self.path, name)
                arrays[name] = np.empty(0, np.uint8) if name == "images/bytes" else dataset[...]
                continue
            if at + length > size:
                raise UserError(
                    f"{self.path} is truncated: {name} ends at byte {at + length:,}, the file has {size:,};"
                    " copy or pack it again"
                )
            arrays[name] = whole[at : at + length].view(dataset.dtype).reshape(dataset.shape)
        self.blob_span = (file["images/bytes"].id.get_offset() or 0, file["images/bytes"].size)
        self.mapped = stored is None
        self.sum_at = file["index_crc32"].id.get_offset() if "index_crc32" in file else None
        self.index_sum = int(file["index_crc32"][0]) if "index_crc32" in file else None
        blob, self.offsets, self.sizes, self.crc32, self.labels, self.keys = (arrays[n] for n in _ARRAYS)
        self.blob: np.ndarray | Hdf5Blob = blob if stored is None else stored
        self.groups = arrays.get("groups")
        self.class_names = [name.decode() for name in arrays["classes/names"]]
        self.counts = arrays["classes/counts"]
        self._check_lengths()

    def _check_format(self) -> None:
        found = self.attributes.get("format")
        if found != FORMAT:
            raise UserError(
                f"{self.path} is HDF5 but not a pack (its 'format' attribute is {found!r}, not {FORMAT!r});"
                " make one with: python -m loaders.pack SOURCE DEST.h5"
            )
        version = self.attributes.get("version")
        if version != VERSION:
            raise UserError(
                f"{self.path} is a pack of version {version}; this program reads version {VERSION}:"
                " update it, or pack again"
            )

    def _check_lengths(self) -> None:
        n = len(self.keys)
        lengths = {"offsets": len(self.offsets) - 1, "sizes": len(self.sizes), "crc32": len(self.crc32)}
        lengths |= {"labels": len(self.labels)} | ({} if self.groups is None else {"groups": len(self.groups)})
        wrong = [f"{name} {length}" for name, length in lengths.items() if length != n]
        if wrong:
            raise UserError(f"{self.path} is damaged: {n} keys but {', '.join(wrong)}; pack it again")
        if self.offsets[-1] != self.blob_span[1]:
            raise UserError(
                f"{self.path} is damaged: the records end at byte {self.offsets[-1]:,} of"
                f" {self.blob_span[1]:,}; pack it again"
            )

    def faults(self, first: int, progress: Callable[[int], object]) -> Iterator[str]:
        where = f"{self.path}: " if first or self.attributes.get("shards", 1) > 1 else ""
        if not index.matches_checksum(self):
            yield f"{where}the index (offsets, labels, keys, attributes) does not match its checksum"
        for i in range(len(self.keys)):
            if not self.sound(i):
                key = self.keys[i].decode(errors="backslashreplace")
                yield f"{where}record {first + i} ({key}) does not match its checksum"
            progress(1)

    def sound(self, i: int) -> bool:
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        return 0 <= start <= stop and zlib.crc32(self.blob[start:stop].data) == self.crc32[i]


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def _unreadable(path: Path, error: OSError) -> str:
    if not path.exists():
        return f"there is no pack at {path}; make one with: python -m loaders.pack SOURCE {path}"
    if path.is_dir():
        return f"{path} is a folder, not a pack; pack it with: python -m loaders.pack {path} DEST.h5"
    if "truncated" in str(error):
        return f"{path} is truncated ({path.stat().st_size:,} bytes); copy or pack it again"
    return f"{path} is not a pack: HDF5 cannot open it ({error}); make one with: python -m loaders.pack SOURCE DEST.h5"


class Pack:
    """A packed dataset: one shard or several, read as one. Make it with `Pack.open`."""

    def __init__(self, shards: Sequence[_Shard], path: Path, class_names: Sequence[str] | None = None):
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
            return cls(_checked(_open_set(Path(path), alone)), Path(path), labels)
        if not path:
            raise UserError("no pack was named")
        superset.check_files(path)
        shards = [shard for p in path for shard in _checked(_open_set(Path(p), alone))]
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

    def _find(self, i: int) -> tuple[_Shard, int]:
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

    def unsound(self, ids: np.ndarray) -> list[int]:
        """Of these records (b,) int64, those whose bytes do not match their checksum, each once."""
        places = [(i, *self._find(i)) for i in dict.fromkeys(ids.tolist())]
        return [i for i, shard, j in places if not shard.sound(j)]

    def verify(self, progress: Callable[[int], object] = lambda records: None) -> list[str]:
        """Check every record and every index against its checksum; a line for each fault, none when sound.

        `progress` is called with the number of records done since its last call.
        """
        return [
            fault
            for shard, first in zip(self._shards, self._starts, strict=False)
            for fault in shard.faults(first, progress)
        ]


def _checked(shards: list[_Shard]) -> list[_Shard]:
    for shard in shards:
        index.check(shard)
    return shards


def _reopen(shards: list[Path], path: Path, class_names: list[str]) -> Pack:
    return Pack([_Shard(p) for p in shards], path, class_names)


def _chosen(labels: np.ndarray, columns: slice | list[int]) -> np.ndarray:
    return labels if isinstance(columns, slice) else labels[:, columns]


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _open_set(path: Path, alone: bool) -> list[_Shard]:
    if alone or path.exists():
        return [_Shard(path)]
    found = [p for p in existing_shards(path) if p != path]
    if not found:
        return [_Shard(path)]
    count = int(found[0].stem.rsplit("-", 1)[1])
    wanted = shard_paths(path, count)
    missing = [p.name for p in wanted if p not in found]
    if missing:
        raise UserError(
            f"{path} is a set of {count} shards of which {len(missing)} are missing: {', '.join(missing)};"
            " copy them here, or pack it again"
        )
    shards = [_Shard(p) for p in wanted]
    strange = [s.path.name for s in shards if s.attributes.get("set") != shards[0].attributes.get("set")]
    if strange:
        raise UserError(f"{path}: {', '.join(strange)} come from another packing than {shards[0].path.name}")
    return shards
