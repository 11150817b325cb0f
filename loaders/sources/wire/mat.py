"""Arrays of numbers in MATLAB's files of version 5 (MATLAB 5 to 7.2): SciPy's reader crashes over damaged ones."""

import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np

_HEADER = 128
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATRIX, _COMPRESSED = 14, 15  # kinds of elements, as those above
_OF_NUMBERS = range(6, 16)  # classes of arrays; others are cells, structures, text, sparse
_MOST = 1 << 26  # bytes that an element may unpack to


def arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of real numbers in a file by their names; what else is in it is passed over.

    ValueError, KeyError, struct.error, zlib.error where it is no such file, or damaged.
    """
    order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(data[_HEADER - 4 : _HEADER])
    if order is None:
        raise ValueError("it does not begin as a MATLAB file of version 5 does")
    found: dict[str, np.ndarray] = {}
    for kind, content in _elements(data[_HEADER:], order):
        if kind == _COMPRESSED:
            unpacking = zlib.decompressobj()
            kind, content = next(_elements(unpacking.decompress(content, _MOST), order), (0, b""))
        if kind == _MATRIX:
            found |= _matrix(content, order)
    return found


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Kind and content of the elements that follow each other."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        begin = at + 8
        if small := kind >> 16:  # up to four bytes, in place of the size
            kind, size, begin = kind & 0xFFFF, small, at + 4
        if begin + size > len(data) or (small and size > 4):
            raise ValueError(f"an element of {size:,} bytes goes on after the end")
        yield kind, data[begin : begin + size]
        at = at + 8 if small else begin + size + (0 if kind == _COMPRESSED else -size % 8)


def _matrix(data: bytes, order: str) -> dict[str, np.ndarray]:
    """The array of a matrix by its name; nothing of one that is not of numbers."""
    flags, shape, name, *parts = _elements(data, order)
    if struct.unpack_from(f"{order}I", flags[1])[0] & 0xFF not in _OF_NUMBERS or not parts:
        return {}
    kind, content = parts[0]
    values = np.frombuffer(content, order + _NUMBERS[kind])
    sides = np.frombuffer(shape[1], f"{order}i4").tolist()
    if math.prod(sides) != len(values):
        raise ValueError(f"an array of {sides} has {len(values):,} values")
    return {name[1].decode("ascii"): values.reshape(sides, order="F")}
