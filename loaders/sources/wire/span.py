"""A part of a file, read where it is looked at: no memory map, whose reader dies where the file becomes shorter."""

import os
from typing import overload

_WINDOW = 64  # bytes read for the sake of one


class Span:
    """Bytes of an open file, from `start` on, `size` of them. Nothing is read before it is asked for.

    ValueError where the file ends before that.
    """

    def __init__(self, descriptor: int, start: int, size: int):
        self._descriptor, self._start, self._size = descriptor, start, size
        self._window, self._at = b"", 0

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, i: int) -> int: ...
    @overload
    def __getitem__(self, i: slice) -> bytes: ...

    def __getitem__(self, i: int | slice) -> int | bytes:
        if isinstance(i, slice):
            first, stop, _ = i.indices(self._size)
            return self._read(first, max(stop - first, 0))
        if not 0 <= i < self._size:
            raise IndexError(i)
        if not self._at <= i < self._at + len(self._window):
            self._window, self._at = self._read(i, min(_WINDOW, self._size - i)), i
        return self._window[i - self._at]

    def _read(self, first: int, size: int) -> bytes:
        parts = []
        while size:
            part = os.pread(self._descriptor, size, self._start + first)
            if not part:
                raise ValueError(f"it ends before byte {self._start + first:,}")
            parts.append(part)
            first, size = first + len(part), size - len(part)
        return b"".join(parts)
