"""Just enough of protocol buffers' wire format to read TensorFlow's Example and Caffe's Datum."""

from collections.abc import Iterator

from loaders.sources.wire.span import Span

Readable = bytes | Span
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


def fields(buffer: Readable, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Fields of the message buffer[start:stop]: number, wire type, and for LENGTH and fixed ones the span of the value.

    For VARINT the third is the value itself. Nothing is copied. ValueError where the bytes are no message.
    """
    at = start
    while at < stop:
        tag, at = varint(buffer, at, stop)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = varint(buffer, at, stop)
            yield number, wire, value, at
            continue
        if wire == LENGTH:
            length, at = varint(buffer, at, stop)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"not a protocol buffer: wire type {wire} at byte {at - start:,}")
        if at + length > stop:
            raise ValueError(f"not a protocol buffer, or cut off: a field of {length:,} bytes at byte {at - start:,}")
        yield number, wire, at, at + length
        at += length


def varint(buffer: Readable, at: int, stop: int) -> tuple[int, int]:
    """A number and where it ends. ValueError if it is cut off or longer than 64 bits."""
    value, shift = 0, 0
    while at < stop and shift < 70:
        byte = buffer[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise ValueError("not a protocol buffer, or cut off: a number without an end")


def signed(value: int) -> int:
    """An int64 from its varint."""
    return value - (1 << 64) if value >> 63 else value
