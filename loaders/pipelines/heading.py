"""A look at an encoded image before a decoder is given it: some decoders crash on what does not begin as an image.

Microseconds a record: the head is parsed up to the sizes, which the index of the pack knows too, and the end marker is
looked for. Pixels are not decoded; damage among them is the decoder's to notice, or the checksum's (`data.check`).
JPEG: ITU-T T.81, Annex B. PNG: W3C Portable Network Graphics, sections 5 and 11.
"""

import zlib

import numpy as np

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by type of colour
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # Huffman: baseline, extended, progressive; what the decoders have in common
_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_SCAN, _END, _TABLES = 0xDA, 0xD9, frozenset({0xC4, 0xDB})


def fault(record: np.ndarray, height: int, width: int) -> str | None:
    """What keeps `record` (bytes,) uint8 from being a JPEG or PNG of these sizes, pixels as displayed; None: nothing.

    EXIF may turn an image, so height and width may be exchanged.
    """
    data = record.data
    if bytes(data[:3]) == b"\xff\xd8\xff":
        return _jpeg(data, height, width)
    if bytes(data[:8]) == _PNG:
        return _png(data, height, width)
    return f"it begins with {bytes(data[:4]).hex(' ') or 'nothing'}, as neither JPEG nor PNG does"


def _sizes(found: tuple[int, int], height: int, width: int) -> str | None:
    if found in ((height, width), (width, height)):
        return None
    return f"its header says {found[1]}x{found[0]} pixels, the index {width}x{height}"


def _jpeg(data: memoryview, height: int, width: int) -> str | None:
    at, length, framed = 2, len(data), 0
    while at + 4 <= length:
        if data[at] != 0xFF:
            return f"its header is broken at byte {at}: no marker"
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker in _NO_LENGTH or marker == _END:
            return f"its header is broken at byte {at}: marker {marker:02x}"
        size = data[at + 2] << 8 | data[at + 3]
        if size < 2 or at + 2 + size > length:
            return f"its header is broken at byte {at}: a segment of {size} bytes"
        body = data[at + 4 : at + 2 + size]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _FRAMES or framed:
                return f"its header has frame {marker:02x} at byte {at}, which is not decoded"
            said = _frame(body, height, width)
            if said:
                return said
            framed = body[5]
        elif marker == _SCAN:
            if not framed:
                return "its header has no sizes before the pixels"
            if len(body) < 6 or not 1 <= body[0] <= framed or len(body) != 4 + 2 * body[0]:
                return f"its header is broken at byte {at}: a scan of {len(body)} bytes"
            return None if _ends(data) else "it has no end marker: it is cut, or damaged"
        elif marker in _TABLES and len(body) < 17:
            return f"its header is broken at byte {at}: a table of {len(body)} bytes"
        at += 2 + size
    return "its header does not end"


def _frame(body: memoryview, height: int, width: int) -> str | None:
    if len(body) < 6 or body[0] != 8 or body[5] not in (1, 3) or len(body) != 6 + 3 * body[5]:
        return "its frame header is broken"
    for at in range(7, len(body), 3):
        if not (1 <= body[at] >> 4 <= 4 and 1 <= body[at] & 15 <= 4 and body[at + 1] <= 3):
            return "its frame header is broken: components"
    return _sizes((body[1] << 8 | body[2], body[3] << 8 | body[4]), height, width)


def _ends(data: memoryview) -> bool:
    """The end marker closes the file, or lies further ahead where something was appended: padding, other pictures."""
    return bytes(data[-2:]) == b"\xff\xd9" or b"\xff\xd9" in bytes(data)


def _png(data: memoryview, height: int, width: int) -> str | None:
    head = bytes(data[8:33])
    if (
        len(head) < 25
        or head[:8] != b"\x00\x00\x00\rIHDR"
        or zlib.crc32(head[4:21]) != int.from_bytes(head[21:], "big")
    ):
        return "its header is broken"
    depth, colour, packing, filtering, interlace = head[16:21]
    if depth not in _PNG_DEPTHS.get(colour, ()) or packing or filtering or interlace > 1:
        return f"its header says what no PNG is: {depth} bits of colour type {colour}"
    said = _sizes((int.from_bytes(head[12:16], "big"), int.from_bytes(head[8:12], "big")), height, width)
    if said:
        return said
    at, pixels = 33, False
    while at + 12 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), bytes(data[at + 4 : at + 8])
        if at + 12 + size > len(data) or not kind.isalpha():
            return f"it is broken at byte {at}: a chunk of {size} bytes"
        if kind == b"IEND":
            return None if pixels and bytes(data[at : at + 12]) == _PNG_END else "it ends without pixels"
        pixels |= kind == b"IDAT"
        at += 12 + size
    return "it has no end: it is cut, or damaged"
