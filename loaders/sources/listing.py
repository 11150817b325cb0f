"""What a source holds, in columns: some tens of bytes per sample besides its name, so that millions fit."""

import os
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, overload, runtime_checkable

import numpy as np

from loaders.errors import shorten
from loaders.sources.names import as_name

if TYPE_CHECKING:
    import hashlib

    from PIL import Image

UNKNOWN = -1
"""The class number of a sample whose class is not known; in vectors of labels it is NaN."""


class Reader(Protocol):
    """Where one encoded image is. It travels to worker processes, so it must pickle."""

    def read(self) -> bytes:
        """The encoded image. OSError or ValueError with the reason if there is none."""


@runtime_checkable
class Decoding(Protocol):
    """A reader whose images are no files in a format that decoders know."""

    def image(self) -> "Image.Image":
        """The image, gray of 8 or 16 bits or RGB, which is then encoded once. Errors as of `Reader`."""


@dataclass(frozen=True)
class Bytes:
    """A file that is in memory."""

    data: bytes
    """All of it."""

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class FileRange:
    """A file on disk, or a part of one (a member of a tar)."""

    path: str
    """The file that is opened."""
    offset: int = 0
    """First byte."""
    size: int = -1
    """Number of bytes; -1: to the end."""

    def read(self) -> bytes:
        with open(self.path, "rb", opener=at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("it is no file, but a pipe, a socket or a device")
            file.seek(self.offset)
            data = file.read(self.size)
        if 0 <= self.size != len(data):
            raise OSError(f"{self.path} ends {self.size - len(data):,} bytes too early")
        return data


def at_once(path: str, flags: int) -> int:
    """Without waiting for another end, as a pipe would have it."""
    return os.open(path, flags | os.O_NONBLOCK)


@dataclass(frozen=True)
class Item:
    """One sample of a source."""

    key: str
    """Unique name within the pack, in text (`as_text` of `names.py`)."""
    reader: Reader
    """Where the encoded image is."""
    label: int | tuple[float, ...]
    """Class number, `UNKNOWN` where there is none, or one number per label with NaN for unknown."""
    group: int = -1
    """Samples of one group (a patient) stay on one side of a split; -1 for none."""


def file_range(place: str, key: str, offset: int, size: int) -> FileRange:
    """Reader of a part of the file `place`."""
    return FileRange(place, offset, size)


def file_in_folder(place: str, key: str, offset: int, size: int) -> FileRange:
    """Reader of the file in the folder `place` whose name is, as text, the last part of the key."""
    return FileRange(f"{place}/{as_name(key.rpartition('/')[2])}")


def file_below(place: str, key: str, offset: int, size: int) -> FileRange:
    """Reader of the file whose path within the folder `place` is, as text, the key."""
    return FileRange(f"{place}/{as_name(key)}")


class Table(Sequence[Item]):
    """Samples in columns; an Item is made when one is asked for. See `TableBuilder`."""

    def __init__(
        self,
        keys: np.ndarray,
        labels: np.ndarray,
        groups: np.ndarray,
        where: tuple[np.ndarray, np.ndarray, np.ndarray],
        places: Sequence[str],
        reader: Callable[[str, str, int, int], Reader],
        readers: np.ndarray | None = None,
    ):
        self.keys, self.labels, self.groups = keys, labels, groups
        """(n,) bytes, UTF-8; (n,) int64 or (n, L) float32; (n,) int64."""
        self._where, self._places, self._reader, self._readers = where, places, reader, readers

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Table":
        """The same samples in columns, in the same order; an existing table is returned as it is."""
        if isinstance(items, Table):
            return items
        items = list(items)
        readers = np.empty(len(items), dtype=object)
        readers[:] = [item.reader for item in items]
        return cls(
            _text([item.key.encode() for item in items]),
            _labels([item.label for item in items]),
            np.array([item.group for item in items], dtype=np.int64),
            (np.zeros(len(items), np.int32), np.zeros(len(items), np.int64), np.zeros(len(items), np.int64)),
            ("",),
            file_range,
            readers,
        )

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, i: int) -> Item: ...
    @overload
    def __getitem__(self, i: slice) -> list[Item]: ...

    def __getitem__(self, i: int | slice) -> Item | list[Item]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        key = self.keys[i].decode()
        label = int(self.labels[i]) if self.labels.ndim == 1 else tuple(self.labels[i].tolist())
        if self._readers is not None:
            reader = self._readers[i]
        else:
            place, offset, size = (int(column[i]) for column in self._where)
            reader = self._reader(self._places[place], key, offset, size)
        return Item(key, reader, label, int(self.groups[i]))

    def take(self, chosen: np.ndarray | slice, labels: np.ndarray | None = None) -> "Table":
        """The rows `chosen`, with `labels` in place of theirs."""
        return Table(
            self.keys[chosen],
            self.labels[chosen] if labels is None else labels,
            self.groups[chosen],
            (self._where[0][chosen], self._where[1][chosen], self._where[2][chosen]),
            self._places,
            self._reader,
            None if self._readers is None else self._readers[chosen],
        )

    def renamed(self, before: str, without: str) -> "Table":
        """The same rows, their keys, which begin with `without`, beginning with `before` in its place."""
        keys = _text([before.encode() + key[len(without.encode()) :] for key in self.keys.tolist()])
        return Table(keys, self.labels, self.groups, self._where, self._places, self._reader, self._readers)

    def apart(self, places: Mapping[str, str]) -> "Table":
        """The same rows; where keys repeat, each key with the name of its place before it, sorted anew by key."""
        if len(np.unique(self.keys)) == len(self.keys):
            return self
        before = [f"{places[place]}/".encode() for place in self._places]
        keys = [before[place] + key for place, key in zip(self._where[0].tolist(), self.keys.tolist(), strict=True)]
        named = Table(_text(keys), self.labels, self.groups, self._where, self._places, self._reader, self._readers)
        return named.take(np.argsort(named.keys, kind="stable"))

    def fingerprint(self, digest: "hashlib._Hash") -> None:
        """Feed what identifies the samples to a hash: names, labels, groups, places."""
        for column in (self.keys, self.labels, self.groups, *self._where):
            digest.update(np.ascontiguousarray(column).data if column.size else b"")
        digest.update("\0".join(self._places).encode(errors="surrogateescape"))


class TableBuilder:
    """Collects samples one by one; `table` sorts them by key."""

    def __init__(self, reader: Callable[[str, str, int, int], Reader]):
        self._reader = reader
        self._places: dict[str, int] = {}
        self._keys: list[bytes] = []
        self._labels: array | list = array("q")  # a list of label vectors
        self._place, self._offset, self._size, self._group = array("i"), array("q"), array("q"), array("q")

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        """Keys of the samples so far, in the order in which they came."""
        return (key.decode() for key in self._keys)

    def add(
        self,
        key: str,
        label: int | Sequence[float],
        place: str,
        offset: int = 0,
        size: int = -1,
        group: int = -1,
    ) -> None:
        """One sample, read by `reader(place, key, offset, size)`."""
        self._keys.append(key.encode())
        if not isinstance(label, int) and not self._labels:
            self._labels = []
        self._labels.append(label)
        self._place.append(self._places.setdefault(place, len(self._places)))
        self._offset.append(offset)
        self._size.append(size)
        self._group.append(group)

    def table(self) -> Table:
        keys = _text(self._keys)
        self._keys = []
        where = np.array(self._place), np.array(self._offset), np.array(self._size)
        groups = np.array(self._group, dtype=np.int64)
        whole = Table(keys, _labels(self._labels), groups, where, tuple(self._places), self._reader)
        return whole.take(np.argsort(keys, kind="stable"))


def _labels(values: Sequence) -> np.ndarray:
    vectors = len(values) > 0 and np.ndim(values[0]) > 0
    return np.array(values, dtype=np.float32 if vectors else np.int64)


def _text(values: list[bytes]) -> np.ndarray:
    return np.array(values, dtype=f"S{max(map(len, values), default=0) or 1}")


@dataclass(frozen=True)
class Listing:
    """What a source holds."""

    items: Sequence[Item]
    """In the order in which they are packed: sorted by key."""
    class_names: tuple[str, ...]
    """Names of the classes or labels."""
    ignored: tuple[str, ...] = ()
    """Files that were found and are not images."""
    notes: tuple[str, ...] = ()
    """What whoever packs this should know."""
    private: frozenset[str] | None = None
    """Settings that name files, where neither these nor the source may be named in a pack. None: all may."""

    @property
    def remarks(self) -> list[str]:
        """All there is to say while packing, a line each."""
        ignored = [
            f"ignored {len(self.ignored):,} files that are not images, such as {name}" for name in self.ignored[:1]
        ]
        return [*ignored, *self.notes, *self._census()]

    def _census(self) -> list[str]:
        """How many classes there are, of how many images; and what of them is hardly meant."""
        labels, names = self.table.labels, self.class_names
        if labels.ndim > 1 or not len(labels):
            return []
        known = labels[labels != UNKNOWN]
        missing = [f"{len(labels) - len(known):,} images have no label"] if len(known) < len(labels) else []
        if not len(known):
            return missing
        counts = np.bincount(known, minlength=len(names))
        small, large = int(counts.argmin()), int(counts.argmax())
        if len(names) == 1:
            one = [f"1 class: {names[0]}, {counts[0]:,} images", f"warning: all images are in one class, {names[0]}"]
            return [*missing, *one]
        said = [
            *missing,
            f"{len(names):,} classes: the smallest, {names[small]}, has {counts[small]:,} images,"
            f" the largest, {names[large]}, {counts[large]:,}",
        ]
        if counts[large] == len(known):
            said.append(f"warning: all images are in one class, {names[large]}")
        elif counts[small] < 2:
            few = [name for name, count in zip(names, counts.tolist(), strict=True) if count < 2]
            said.append(f"warning: {len(few):,} classes have fewer than 2 images: {shorten(few)}")
        return said

    @property
    def table(self) -> Table:
        """The items in columns."""
        return Table.of(self.items)
