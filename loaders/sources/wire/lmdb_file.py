"""The keys and values of an LMDB, read from its pages, each of which is checked: the library crashes over damaged ones.

The format is that of LMDB 0.9, of 64 bits, little endian: `MDB_meta`, `MDB_page` and `MDB_node` of its mdb.c. Not read:
databases within the database, several values of a key, orders of keys other than that of bytes.
"""

import os
import struct
from collections.abc import Iterator

from loaders.sources.wire.span import Span

_PAGE = struct.Struct("<QHHHH")  # its number, padding, flags, end of the places of nodes, begin of the nodes
_META = struct.Struct("<II8xQ")  # magic number, version, size of the map
_DATABASE = struct.Struct("<IHHQQQQQ")  # size of pages, flags, depth; branch, leaf, overflow pages, entries, root
_NODE = struct.Struct("<HHHH")  # size of the value, or number of a page; flags; size of the key
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_MAIN = _PAGE.size + _META.size + _DATABASE.size  # the free pages have one before it
_TRANSACTION = _MAIN + _DATABASE.size + 8
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_KINDS = _BRANCH | _LEAF | _OVERFLOW | _META_PAGE
_ON_PAGES, _DATABASE_INSIDE, _SEVERAL = 1, 2, 4  # flags of a node
_NONE = 2**64 - 1  # root of an empty database
_DEEPEST = 32


class LmdbFile:
    """An LMDB, open as long as this is held; it may be used over a fork. ValueError where it is none, or damaged."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  as long as this lives
        self._size = os.fstat(self._file.fileno()).st_size
        head = self._bytes(0, _TRANSACTION + 8)
        (self._page_size,) = struct.unpack_from("<I", head, _PAGE.size + _META.size)
        if self._page_size not in (1 << n for n in range(9, 17)):
            raise ValueError(f"its pages are of {self._page_size:,} bytes")
        # Of the two that describe it, the later transaction counts.
        newest = max((self._meta(number) for number in (0, 1)), key=lambda meta: meta[0])
        self._depth, self._root = newest[1:]

    def items(self) -> Iterator[tuple[bytes, Span]]:
        """All keys, sorted, with their values."""
        self._left = self._size // self._page_size  # pages that there are: none is in the tree twice
        if self._root != _NONE:
            yield from self._below(self._root, self._depth)

    def get(self, key: bytes) -> Span | None:
        """The value of a key."""
        number, depth = self._root, self._depth
        if number == _NONE:
            return None
        while depth > 1:
            page, places = self._page(number, _BRANCH)
            low, high = 0, len(places)  # the last node whose key is not greater; the first has none
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._key(page, places[middle]) <= key else (low, middle)
            number, depth = self._child(page, places[low]), depth - 1
        page, places = self._page(number, _LEAF)
        place = next((place for place in places if self._key(page, place) == key), None)
        return None if place is None else self._value(number, page, place)

    def _meta(self, number: int) -> tuple[int, int, int]:
        """Transaction, depth, root."""
        data = self._bytes(number * self._page_size, _TRANSACTION + 8)
        magic, version, _ = _META.unpack_from(data, _PAGE.size)
        if (magic, version) != (_MAGIC, _VERSION):
            raise ValueError(f"it does not begin as an LMDB of version {_VERSION} does")
        _, flags, depth, _, _, _, _, root = _DATABASE.unpack_from(data, _MAIN)
        if root != _NONE and (flags & 0x7FFF or not 1 <= depth <= _DEEPEST):
            raise ValueError(f"a database with flags {flags:#x} and depth {depth}; only plain ones can be read")
        return struct.unpack_from("<Q", data, _TRANSACTION)[0], depth, root

    def _below(self, number: int, depth: int) -> Iterator[tuple[bytes, Span]]:
        self._left -= 1
        if self._left < 0:
            raise ValueError("its pages lead in a circle")
        page, places = self._page(number, _LEAF if depth == 1 else _BRANCH)
        for place in places:
            if depth > 1:
                yield from self._below(self._child(page, place), depth - 1)
            else:
                yield self._key(page, place), self._value(number, page, place)

    def _page(self, number: int, kind: int) -> tuple[bytes, tuple[int, ...]]:
        """A page of nodes, and where each begins in it."""
        page = self._bytes(number * self._page_size, self._page_size)
        own, _, flags, end, _ = _PAGE.unpack_from(page)
        count = (end - _PAGE.size) >> 1
        if own != number or flags & _KINDS != kind or not 1 <= count <= (self._page_size - _PAGE.size) >> 1:
            raise ValueError(f"page {number:,} is not what it should be")
        return page, struct.unpack_from(f"<{count}H", page, _PAGE.size)

    def _key(self, page: bytes, place: int) -> bytes:
        *_, size = _NODE.unpack_from(page, place)
        return page[place + _NODE.size : place + _NODE.size + size]

    def _child(self, page: bytes, place: int) -> int:
        low, high, more, _ = _NODE.unpack_from(page, place)
        return low | high << 16 | more << 32

    def _value(self, number: int, page: bytes, place: int) -> Span:
        low, high, flags, key = _NODE.unpack_from(page, place)
        size, begin = low | high << 16, place + _NODE.size + key
        if flags & (_DATABASE_INSIDE | _SEVERAL):
            raise ValueError(f"page {number:,} holds a database within the database")
        if not flags & _ON_PAGES:
            if begin + size > self._page_size:
                raise ValueError(f"page {number:,} has a value that goes on after its end")
            return Span(self._file.fileno(), number * self._page_size + begin, size)
        (first,) = struct.unpack_from("<Q", page, begin)
        own, _, kind, *_ = _PAGE.unpack(self._bytes(first * self._page_size, _PAGE.size))
        start = first * self._page_size + _PAGE.size
        if own != first or kind & _KINDS != _OVERFLOW or start + size > self._size:
            raise ValueError(f"page {first:,} is not what it should be")
        return Span(self._file.fileno(), start, size)

    def _bytes(self, at: int, size: int) -> bytes:
        if at + size > self._size:
            raise ValueError(f"it ends at byte {self._size:,}, before {at + size:,}, which it speaks of")
        return Span(self._file.fileno(), at, size)[:]
