"""An LMDB of encoded images."""

import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import UserError, reading, reason
from loaders.sources.classes import as_meant, check_label, with_classes
from loaders.sources.folders import LEVEL as SETTINGS
from loaders.sources.folders import Classes, find_classes, is_hidden
from loaders.sources.listing import Listing, TableBuilder
from loaders.sources.names import as_name, as_text
from loaders.sources.wire.lmdb_file import LmdbFile
from loaders.sources.wire.protobuf import LENGTH, VARINT, Readable, fields, signed

KIND = "lmdb"
HELP = (
    "an LMDB whose keys are CLASS/FILE and values images, or image-… beside label-…, or whose values are pickled"
    " (bytes, label) or Caffe's Datum"
)
__all__ = ["HELP", "KIND", "SETTINGS", "accepts", "listing"]
_SPECIAL = (b"__keys__", b"__len__")
_IMAGES = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
_DATUM_DATA, _DATUM_LABEL, _DATUM_ENCODED = 4, 5, 7


@dataclass(frozen=True)
class LmdbImage:
    """The image in one value."""

    path: str
    """The database."""
    key: bytes
    """Of the value."""

    def read(self) -> bytes:
        with reading(f"{self.path}, the value of {self.key!r}", "an image"):
            value = _database(self.path).get(self.key)
            if value is None:
                raise OSError(f"{self.path} has no longer the key {self.key!r}")
            return _unwrap(value)[0]


def lmdb_image(place: str, key: str, offset: int, size: int) -> LmdbImage:
    """Reader of the value whose key, as text, is `key`."""
    return LmdbImage(place, as_name(key).encode(errors="surrogateescape"))


@lru_cache(maxsize=8)
def _database(path: str) -> LmdbFile:
    return LmdbFile(str(_file(path)))


def _file(path: str) -> Path:
    return Path(path, "data.mdb") if Path(path).is_dir() else Path(path)


def accepts(source: str) -> bool:
    return _file(source).is_file() and (Path(source).is_dir() or Path(source).suffix in (".lmdb", ".mdb"))


def listing(source: str, under: str | None = None, settings: Mapping[str, str] | None = None) -> Listing:
    if not Path(source).exists():
        raise UserError(f"there is no LMDB at {source}")
    builder = TableBuilder(lmdb_image)
    labels: dict[int | str | _Folder, int] = {}
    counts: Counter[str] = Counter()  # images of each folder, where the folders are the classes
    hidden: list[str] = []
    inside = f"{under.strip('/')}/" if under else ""
    _database.cache_clear()  # a file may have been replaced since
    with reading(_file(source), "an LMDB"):
        database = _database(source)
        for key, value in database.items():
            if key in _SPECIAL or key.startswith(b"label-") or key == b"num-samples":
                continue
            try:
                name = as_text(key.decode(errors="surrogateescape"))
                label = _label(database, key, name, value)
            except Exception as error:  # pickle raises nearly anything
                raise UserError(
                    f"{source}: the value of {key!r} cannot be used: {reason(error)}; expected {HELP}"
                ) from error
            if not name.startswith(inside):
                continue
            if isinstance(label, _Folder):
                label = _Folder(label.path[len(inside) :] or label.path)
                if is_hidden(name[len(inside) :]):
                    hidden.append(name)
                    continue
                counts[label.path] += 1
            builder.add(name, labels.setdefault(label, len(labels)), source)
    if not len(builder):
        raise UserError(f"{source} holds no images" + (f" under {under!r}" if under else ""))
    found = find_classes(counts, source, (settings or {}).get("level")) if counts else Classes({}, "", ())
    plain = as_meant([label for label in labels if not isinstance(label, _Folder)], source)
    rest: Iterator[int | str] = iter([str(label) if counts else label for label in plain])  # beside folders, names
    names: list[int | str] = [found.of[label.path] if isinstance(label, _Folder) else next(rest) for label in labels]
    distinct = {name: number for number, name in enumerate(dict.fromkeys(names))}
    table = builder.table()
    table = table.take(slice(None), np.array([distinct[name] for name in names])[table.labels])
    skipped = [f"skipped {len(hidden):,} images in hidden or system folders, such as {hidden[0]}"] if hidden else []
    return Listing(*with_classes(table, list(distinct), source), notes=(*found.notes, *skipped))


@dataclass(frozen=True)
class _Folder:
    """The class of an image whose key is CLASS/FILE."""

    path: str
    """All of the key but FILE."""


def _label(database: LmdbFile, key: bytes, name: str, value: Readable) -> int | str | _Folder:
    if not _is_image(value):
        label = _unwrap(value)[1]
        assert label is not None, "only of an image itself is the label not known"
        return label
    if key.startswith(b"image-"):
        beside = database.get(b"label-" + key[len(b"image-") :])
        if beside is None:
            raise ValueError("there is no label beside the image")
        return check_label(beside[:].decode())
    folder, _, _ = name.rpartition("/")
    if not folder:
        raise ValueError("an image without a label: its key is not CLASS/FILE")
    return _Folder(folder)


def _is_image(value: Readable) -> bool:
    return value[:12].startswith(_IMAGES)


def _unwrap(value: Readable) -> tuple[bytes, int | str | None]:
    """Image and label of a value; the label is None where the value is the image itself. ValueError if neither."""
    if _is_image(value):
        return value[:], None
    if value[:1] == b"\x80":
        found = _Plain(BytesIO(value[:])).load()
        if isinstance(found, tuple | list) and len(found) >= 2 and isinstance(found[0], bytes):
            label = found[1]
            return found[0], check_label(label.decode() if isinstance(label, bytes) else label)
        raise ValueError("what is pickled is not (bytes, label)")
    image: tuple[int, int] | None = None
    label = None
    encoded = False
    for number, wire, first, last in fields(value, 0, len(value)):
        if (number, wire) == (_DATUM_DATA, LENGTH):
            image = first, last
        elif number == _DATUM_LABEL:
            if wire != VARINT:
                raise ValueError("the label of the Datum is no whole number")
            label = signed(first)
        elif (number, wire) == (_DATUM_ENCODED, VARINT):
            encoded = bool(first)
    if image is None or label is None:
        raise ValueError("neither an image, nor pickled (bytes, label), nor a Datum with data and label")
    if not encoded and not _is_image(value[image[0] : image[1]]):
        raise ValueError("a Datum of raw pixels; only encoded images can be packed")
    return value[image[0] : image[1]], check_label(label)


class _Plain(pickle.Unpickler):
    """Reads tuples, bytes, numbers; anything that names a class or function could run code, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain (bytes, label) is read")
