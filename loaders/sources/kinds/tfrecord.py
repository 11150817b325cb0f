"""TFRecord files of tf.train.Example with image/encoded and image/class/label, read without TensorFlow."""

import os
import struct
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import UserError, reading, reason
from loaders.sources.checking import in_processes
from loaders.sources.classes import as_meant, check_class_numbers, check_label, expand
from loaders.sources.listing import Listing, TableBuilder
from loaders.sources.names import as_text, telling_apart
from loaders.sources.wire.crc32c import masked_crc32c
from loaders.sources.wire.protobuf import FIXED32, LENGTH, VARINT, Readable, fields, signed, varint
from loaders.sources.wire.span import Span

KIND = "tfrecord"
HELP = "a TFRecord file, a folder of them, or a pattern: image/encoded, image/class/label[, image/class/synset]"
IMAGE, LABEL, NAMES, FILE = b"image/encoded", b"image/class/label", b"image/class/synset", b"image/filename"
_BYTES, _FLOAT, _INT64 = 1, 2, 3
_KINDS = {_BYTES: "bytes_list", _FLOAT: "float_list", _INT64: "int64_list"}
_HEAD, _TAIL = 12, 4  # bytes around a record: its length and that one's checksum; its own checksum
_MANY = 1 << 28  # bytes of input from which processes are worth starting


@dataclass(frozen=True)
class TfRecordImage:
    """The image in one record."""

    path: str
    """The TFRecord file."""
    offset: int
    """Where the record's Example begins."""
    size: int
    """Bytes of the Example."""

    def read(self) -> bytes:
        with reading(f"{self.path}, the record at byte {self.offset:,}", "a TFRecord"):
            return self._read()

    def _read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size + _TAIL)
        if len(data) < self.size + _TAIL:
            raise OSError(f"{self.path} ends within the record at byte {self.offset:,}")
        example, (stored,) = data[: self.size], struct.unpack("<I", data[self.size :])
        if masked_crc32c(example) != stored:
            raise ValueError(f"the TFRecord at byte {self.offset:,} of {self.path} does not match its checksum")
        start, stop = _image(example, _example(example, 0, self.size))
        return example[start:stop]


def record_image(place: str, key: str, offset: int, size: int) -> TfRecordImage:
    """Reader of the record at `offset`."""
    return TfRecordImage(place, offset, size)


def accepts(source: str) -> bool:
    paths = _paths(source)
    return bool(paths) and _is_tfrecord(paths[0])


def _paths(source: str) -> list[str]:
    if Path(source).is_dir():
        return sorted(str(p) for p in Path(source).iterdir() if p.is_file() and _is_tfrecord(str(p)))
    return expand(source)


def _is_tfrecord(path: str) -> bool:
    """By the checksum of the first record's length."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    return len(head) == _HEAD and masked_crc32c(head[:8]) == struct.unpack("<I", head[8:])[0]


def listing(source: str, under: str | None = None) -> Listing:
    if under:
        raise UserError("TFRecord files have no sub-trees; choose files with a pattern instead of --under")
    paths = _paths(source)
    if not paths:
        raise UserError(f"there are no TFRecord files at {source}")
    builder = TableBuilder(record_image)
    names: dict[int, str] = {}
    workers = len(os.sched_getaffinity(0)) if sum(map(os.path.getsize, paths)) > _MANY and len(paths) > 1 else 0
    with closing(in_processes(_scan, paths, workers) if workers else map_closing(_scan, paths)) as scanned:
        for path, shard, found in zip(paths, telling_apart(paths), scanned, strict=True):
            if isinstance(found, str):
                raise UserError(found)
            offsets, sizes, labels, files, called = found
            for number, name in called.items():
                if names.setdefault(number, name) != name:
                    raise UserError(f"{path}: label {number} is called both {names[number]} and {name}")
            for i, file in enumerate(files):
                key = f"{shard}/{i:07d}" + (f"/{file}" if file else "")
                builder.add(key, int(labels[i]), path, int(offsets[i]), int(sizes[i]))
    if not len(builder):
        raise UserError(f"{source} holds no records")
    table = builder.table()
    check_class_numbers([int(table.labels.max())], source)
    classes = tuple(names.get(number, str(number)) for number in range(int(table.labels.max()) + 1))
    return Listing(table, classes)


def map_closing(work: Callable[[str], Any], jobs: Iterable[str]) -> Generator[Any, None, None]:
    """`map` as a generator, which can be closed."""
    yield from map(work, jobs)


def _scan(path: str) -> tuple | str:
    """Offsets, sizes, labels, file names of a file's records, and names of labels; or what is wrong with it.

    Of a record only what lies around the image is touched: the page cache need not read the images for this.
    """
    offsets: list[int] = []
    sizes: list[int] = []
    labels: list[int] = []
    files: list[str] = []
    names: dict[int, str] = {}
    size = os.path.getsize(path)
    if not size:
        return offsets, sizes, labels, files, names
    with open(path, "rb") as file:
        data, at = Span(file.fileno(), 0, size), 0
        while at < size:
            head = data[at : at + _HEAD]
            if len(head) < _HEAD:
                return f"{path} is truncated within the record at byte {at:,}; copy it again"
            length, stored = struct.unpack("<QI", head)
            if masked_crc32c(head[:8]) != stored:
                return f"{path} is damaged, or not a TFRecord file: the length at byte {at:,} fails its checksum"
            start = at + _HEAD
            if start + length + _TAIL > size:
                return f"{path} is truncated within the record at byte {at:,}; copy it again"
            try:
                example = _example(data, start, start + length)
                _image(data, example)
                number = _label(data, example)
                file_name, called = (_text(data, example.get(name)) for name in (FILE, NAMES))
            except KeyError as absent:
                there = sorted(name.decode(errors="backslashreplace") for name in example)
                return (
                    f"{path}: the record at byte {at:,} has no {absent.args[0].decode()}; expected {IMAGE.decode()} and"
                    f" {LABEL.decode()}, it has {', '.join(there) or 'nothing'}"
                )
            except (ValueError, IndexError, OverflowError, struct.error) as error:
                return f"{path}: the record at byte {at:,} cannot be used as a tf.train.Example: {reason(error)}"
            offsets.append(start)
            sizes.append(length)
            labels.append(number)
            files.append(file_name)
            if called:
                names.setdefault(number, called)
            at = start + length + _TAIL
    return np.array(offsets), np.array(sizes), np.array(labels), files, names


@dataclass(frozen=True)
class _Feature:
    """One feature of an Example: its kind of list, and where this lies."""

    kind: int
    """Field of tf.train.Feature: a key of _KINDS; 0 where none is set."""
    start: int
    """First byte of the list."""
    stop: int
    """One past its last byte."""

    def __str__(self) -> str:
        return _KINDS.get(self.kind, "feature without a list")


def _example(data: Readable, start: int, stop: int) -> dict[bytes, _Feature]:
    """The features of an Example by their names."""
    found: dict[bytes, _Feature] = {}
    for number, wire, lo, hi in fields(data, start, stop):
        if (number, wire) == (1, LENGTH):  # Example.features, its only field
            for inner, kind, first, last in fields(data, lo, hi):
                if (inner, kind) == (1, LENGTH):
                    name, feature = _feature(data, first, last)
                    found[name] = feature
    return found


def _feature(data: Readable, start: int, stop: int) -> tuple[bytes, _Feature]:
    """An entry of the map from names to features; of what is there twice, the last counts."""
    name, feature = b"", _Feature(0, 0, 0)
    for number, wire, lo, hi in fields(data, start, stop):
        if (number, wire) == (1, LENGTH):
            name = data[lo:hi]
        elif (number, wire) == (2, LENGTH):
            for kind, inner, first, last in fields(data, lo, hi):
                if kind in _KINDS and inner == LENGTH:
                    feature = _Feature(kind, first, last)
    return name, feature


def _image(data: Readable, example: dict[bytes, _Feature]) -> tuple[int, int]:
    """Where the encoded image lies. KeyError if there is none, ValueError if the feature holds something else."""
    feature = example[IMAGE]
    spans = _spans(data, feature) if feature.kind == _BYTES else []
    if len(spans) != 1:
        many = f" of {len(spans):,} values" if feature.kind == _BYTES else ""
        raise ValueError(f"{IMAGE.decode()} is a {feature}{many}; a bytes_list of one image is expected")
    return spans[0]


def _label(data: Readable, example: dict[bytes, _Feature]) -> int:
    """The class number that is meant, whatever kind of list holds it. KeyError and ValueError as of `_image`."""
    feature = example[LABEL]
    values = _values(data, feature)
    if len(values) != 1:
        many = f"holds {len(values):,} values" if values else "is empty"
        raise ValueError(f"{LABEL.decode()}, a {feature}, {many}; one class number is expected")
    try:
        label = check_label(values[0].decode() if isinstance(values[0], bytes) else values[0])
        (number,) = as_meant([label], "")
        if isinstance(number, int):
            check_class_numbers([number], "it")
    except ValueError as error:
        raise ValueError(f"{LABEL.decode()}, a {feature}: {error}") from error
    if isinstance(number, str):
        raise ValueError(f"{LABEL.decode()}, a {feature}, holds the name {number!r}; a class number is expected")
    return number


def _spans(data: Readable, feature: _Feature) -> list[tuple[int, int]]:
    return [
        (lo, hi) for number, wire, lo, hi in fields(data, feature.start, feature.stop) if (number, wire) == (1, LENGTH)
    ]


def _values(data: Readable, feature: _Feature) -> list[bytes | float | int]:
    """All values of a list; numbers may be packed, or each have its tag."""
    if feature.kind == _BYTES:
        return [data[lo:hi] for lo, hi in _spans(data, feature)]
    found: list[bytes | float | int] = []
    for number, wire, lo, hi in fields(data, feature.start, feature.stop):
        if number != 1:
            continue
        if feature.kind == _FLOAT and wire in (LENGTH, FIXED32):
            if (hi - lo) % 4:
                raise ValueError("a float_list that is cut off")
            found += struct.unpack(f"<{(hi - lo) // 4}f", data[lo:hi])
        elif feature.kind == _INT64 and wire == VARINT:
            found.append(signed(lo))
        elif feature.kind == _INT64 and wire == LENGTH:
            while lo < hi:
                value, lo = varint(data, lo, hi)
                found.append(signed(value))
    return found


def _text(data: Readable, feature: _Feature | None) -> str:
    """The first value of a list of bytes; empty where there is none."""
    spans = _spans(data, feature) if feature and feature.kind == _BYTES else []
    return as_text(data[slice(*spans[0])].decode(errors="surrogateescape")) if spans else ""
