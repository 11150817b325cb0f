"""How a pack file is written, byte by byte, and summed. `shard.py` reads it; docs/pack-format.md describes it."""

import os
import threading
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

FORMAT = "boosterbit-pack"
VERSION = 1
_CHUNK = 1 << 24  # bytes summed at a time


def write_file(
    path: Path, blob_bytes: int, arrays: dict[str, np.ndarray], attributes: Mapping[str, Any]
) -> tuple[int, int]:
    """Create a pack file with room for `blob_bytes` of images; the byte offsets of the blob and of the index sum.

    Byte strings (dtype S) are stored as fixed-length UTF-8. The caller fills in the images, then the sum.
    """
    # `libver` gives metadata with checksums; aligned arrays are what a memory map reads fastest.
    with h5py.File(path, "w", libver="latest", alignment_threshold=1, alignment_interval=64) as file:
        for name, value in {"format": FORMAT, "version": VERSION, **attributes}.items():
            # Of fixed length: strings of variable length lie in a heap without a checksum, where HDF5 may loop for
            # ever over one flipped bit.
            text = value.encode() if isinstance(value, str) else None
            dtype = None if text is None else h5py.string_dtype("utf-8", len(text) or 1)
            file.attrs.create(name, value if text is None else text, dtype=dtype)
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((blob_bytes,))
        group = file.create_group("images")
        blob = h5py.h5d.create(group.id, b"bytes", h5py.h5t.STD_U8LE, space, creation)
        for name, values in arrays.items():
            is_text = values.dtype.kind == "S"
            dtype = h5py.string_dtype("utf-8", values.dtype.itemsize) if is_text else values.dtype.newbyteorder("<")
            file.create_dataset(name, data=values.astype(dtype))
        index_sum = file.create_dataset("index_crc32", data=np.zeros(1, "<u4"))
        return blob.get_offset() or 0, index_sum.id.get_offset()


def index_checksum(path: Path, blob: tuple[int, int], sum_at: int) -> int:
    """CRC-32 of everything in the file but the images (they have their own) and the four bytes of this sum."""
    skip = sorted([(blob[0], blob[0] + blob[1]), (sum_at, sum_at + 4)])
    size = path.stat().st_size
    crc, at = 0, 0
    with open(path, "rb") as file:
        for lo, hi in [*skip, (size, size)]:
            file.seek(at)
            while at < lo:
                piece = file.read(min(_CHUNK, lo - at))
                if not piece:
                    break
                crc = zlib.crc32(piece, crc)
                at += len(piece)
            at = max(at, hi)
    return crc


def elsewhere(file: h5py.File, name: str) -> str:
    """What leads out of a file where a dataset of it is looked for; empty where nothing does."""
    group: Any = file
    for part in name.split("/"):
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        if link is None:
            return ""  # not there
        if not isinstance(link, h5py.HardLink):
            return "is a link"
        group = group[part]
    if isinstance(group, h5py.Dataset) and (group.is_virtual or group.external):
        return "lies in other files"
    return ""


class Hdf5Blob:
    """Slices of a blob that someone stored chunked or compressed, through HDF5: right, but one reader at a time."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name, self._lock = path, name, threading.Lock()

    def __getitem__(self, piece: slice) -> np.ndarray:
        with self._lock:
            return _dataset(self._path, self._name, os.getpid())[piece]


@lru_cache(maxsize=16)
def _dataset(path: Path, name: str, process: int) -> h5py.Dataset:
    """Few are kept open, however many shards there are. An HDF5 handle does not survive a fork: `process`."""
    return h5py.File(path, "r")[name]
