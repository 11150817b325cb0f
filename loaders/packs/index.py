"""Whether the index of a pack file is one: looked at when it is opened, for what it says goes into training unseen."""

from pathlib import Path
from typing import Protocol

import numpy as np

from loaders.errors import UserError
from loaders.packs.hdf5 import index_checksum
from loaders.sources.listing import UNKNOWN


class Index(Protocol):
    """What is looked at: a file of a pack. n records."""

    path: Path
    offsets: np.ndarray  # (n + 1,) int64
    sizes: np.ndarray  # (n, 2) int32, height and width
    crc32: np.ndarray  # (n,) uint32
    labels: np.ndarray  # (n,) int64, or (n, L) float32
    keys: np.ndarray  # (n,) bytes
    groups: np.ndarray | None  # (n,) int64
    counts: np.ndarray  # (L,) int64
    class_names: list[str]
    blob_span: tuple[int, int]
    sum_at: int | None
    index_sum: int | None
    mapped: bool


def matches_checksum(index: Index) -> bool:
    """Whether everything but the images is what was written; files without a checksum, or chunked, cannot tell."""
    if index.sum_at is None or not index.mapped:
        return True
    return index_checksum(index.path, index.blob_span, index.sum_at) == index.index_sum


def check(index: Index) -> None:
    """UserError where an index does not match its checksum, or says what cannot be.

    It reads the whole index once, in one pass for the checksum; the images are not read.
    """
    said = _form(index) or _values(index)
    if said is None and not matches_checksum(index):
        said = "the index (offsets, labels, keys, attributes) does not match its checksum"
    if said:
        raise UserError(f"{index.path} is damaged: {said}; copy or pack it again")


def _form(index: Index) -> str | None:
    """What is wrong with types and ranks of the arrays."""
    arrays = [("offsets", index.offsets, "iu", 1), ("sizes", index.sizes, "iu", 2), ("crc32", index.crc32, "u", 1),
              ("keys", index.keys, "S", 1), ("counts", index.counts, "iu", 1)]  # fmt: skip
    arrays += [] if index.groups is None else [("groups", index.groups, "iu", 1)]
    vectors = index.labels.ndim == 2
    arrays.append(("labels", index.labels, "f" if vectors else "iu", 2 if vectors else 1))
    for name, array, kinds, rank in arrays:
        if array.dtype.kind not in kinds or array.ndim != rank:
            return f"{name} is {array.dtype} of shape {array.shape}"
    classes = len(index.class_names)
    if index.sizes.shape[1] != 2:
        return f"sizes is of shape {index.sizes.shape}, expected height and width"
    if len(index.counts) != classes or (vectors and index.labels.shape[1] != classes):
        return f"it has {classes} classes, {len(index.counts)} counts and labels of shape {index.labels.shape}"
    return None


def _values(index: Index) -> str | None:
    """What is wrong with the values of arrays of the right form; the first record is named."""
    at = _first(np.diff(index.offsets) < 0) if index.offsets[0] == 0 else 0
    if at is not None:
        return f"record {at} does not begin where the one before it ends"
    at = _first((index.sizes <= 0).any(axis=1))
    if at is not None:
        return f"record {at} has {index.sizes[at, 1]}x{index.sizes[at, 0]} pixels"
    if index.labels.ndim == 1:
        at = _first((index.labels < UNKNOWN) | (index.labels >= len(index.class_names)))
        return None if at is None else f"record {at} has label {index.labels[at]}, of {len(index.class_names)} classes"
    at = _first(((index.labels < 0) | (index.labels > 1)).any(axis=1))  # NaN, for unknown, is neither
    return None if at is None else f"record {at} has a label that is no share from 0 to 1"


def _first(rows: object) -> int | None:
    wrong = np.asarray(rows)
    return int(wrong.argmax()) if wrong.any() else None
