"""One file of a pack: its arrays, as views of one memory map."""

import errno
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from loaders.errors import SystemRefusal, UserError, check_regular, in_words, told
from loaders.packs import index
from loaders.packs.hdf5 import FORMAT, VERSION, Hdf5Blob, elsewhere
from loaders.packs.mapped import map_file

_ARRAYS = ("images/bytes", "images/offsets", "images/sizes", "images/crc32", "labels", "keys")
_DENSEST, _SPARE = 64, 1 << 20  # bytes that a byte of a compressed file may stand for; and in any case


class ShardFile:
    """What one file holds. UserError where it is no pack or damaged, SystemRefusal where it may not be read."""

    def __init__(self, path: Path):
        self.path = path
        check_regular(path)
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise _unreadable(path, error) from error
        try:
            with file, told(f"the pack {path} cannot be read"):
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
        optional = [name for name in ("groups", "index_crc32") if file.get(name, getlink=True) is not None]
        for name in (*_ARRAYS, *optional, "classes/names", "classes/counts"):
            if said := elsewhere(file, name):
                raise UserError(f"{self.path} is refused: {name} {said}, outside of it; pack it again")
        names = [*_ARRAYS, *(n for n in ("groups",) if n in file), "classes/names", "classes/counts"]
        absent = [n for n in names if n not in file]
        if absent:
            raise UserError(f"{self.path} is damaged: it lacks {', '.join(absent)}; pack it again")
        self._opened = _identity(self.path)
        whole = map_file(self.path)
        arrays: dict[str, np.ndarray] = {}
        stored: Hdf5Blob | None = None
        for name in names:
            dataset = file[name]
            at, length = dataset.id.get_offset(), dataset.size * dataset.dtype.itemsize
            if length > _SPARE + _DENSEST * len(whole):
                raise UserError(
                    f"{self.path} is damaged: {name} is of {length:,} bytes, and the file of {len(whole):,}; pack it"
                    " again"
                )
            if at is None or not length:
                if name == "images/bytes" and dataset.size:
                    stored = Hdf5Blob(self.path, name)
                arrays[name] = np.empty(0, np.uint8) if name == "images/bytes" else dataset[...]
                continue
            arrays[name] = whole[at : at + length].view(dataset.dtype).reshape(dataset.shape)
        self.blob_span = (file["images/bytes"].id.get_offset() or 0, file["images/bytes"].size)
        self.mapped = stored is None
        self.sum_at = file["index_crc32"].id.get_offset() if "index_crc32" in file else None
        self.index_sum = int(file["index_crc32"][0]) if "index_crc32" in file else None
        blob, self.offsets, self.sizes, self.crc32, self.labels, self.keys = (arrays[n] for n in _ARRAYS)
        self.blob: np.ndarray | Hdf5Blob = blob if stored is None else stored
        self.groups = arrays.get("groups")
        self.class_names = [name.decode(errors="backslashreplace") for name in arrays["classes/names"]]
        self.counts = arrays["classes/counts"]
        self._check_lengths()

    def check_same(self) -> None:
        """UserError where the file of this name is no longer the one that was opened: what is mapped may be gone."""
        with told(f"the pack {self.path} cannot be looked at any more"):
            now = _identity(self.path)
        if now != self._opened:
            said = "shorter or longer" if now[:2] == self._opened[:2] else "another file"
            raise UserError(
                f"the pack {self.path} is {said} now ({now[2]:,} bytes, before {self._opened[2]:,}): it was replaced "
                "or cut off while it was in use; put it back, and the same command goes on"
            )

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


def _identity(path: Path) -> tuple[int, int, int]:
    """Device, number and size of a file."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value.item() if isinstance(value, np.generic) else value


def _unreadable(path: Path, error: OSError) -> UserError:
    if error.errno == errno.ENOENT:
        return UserError(f"there is no pack at {path}; make one with: python -m loaders.pack SOURCE {path}")
    if error.errno == errno.EISDIR:
        return UserError(f"{path} is a folder, not a pack; pack it with: python -m loaders.pack {path} DEST.h5")
    if error.errno is not None:
        return SystemRefusal(f"the pack {path} cannot be read: {in_words(OSError(error.errno, None))}")  # not HDF5's
    if "truncated" in str(error):
        return UserError(f"{path} is truncated ({path.stat().st_size:,} bytes); copy or pack it again")
    make = "make one with: python -m loaders.pack SOURCE DEST.h5"
    return UserError(f"{path} is not a pack: HDF5 cannot open it ({error}); {make}")
