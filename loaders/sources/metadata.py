"""What a JPEG or PNG says beside its pixels: how it is turned, told so that every reader takes it alike.

Decoders differ on EXIF blocks that are doubled, malformed, or of another type than the standard has, on orientation in
XMP, and on chunks of the wrong length: some take them, some pass them over, some fail. So an image with such is given
none but the smallest EXIF block there is. JPEG: ITU-T T.81, Annex B. PNG: W3C Portable Network Graphics, section 11.
EXIF: CIPA DC-008, section 4.6.
"""

import struct
import zlib
from collections.abc import Iterator

PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION, _SHORT = 0x0112, 3
_EXIF, _JFIF, _ADOBE, _SCAN, _COMMENT = 0xE1, 0xE0, 0xEE, 0xDA, 0xFE
_BARE = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_LENGTHS = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7}
# By type of colour: gray, RGB, palette, gray and alpha, RGB and alpha.
_BACKGROUND, _BITS = {0: 2, 2: 6, 3: 1, 4: 2, 6: 6}, {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
Part = tuple[int | bytes, int, int, int]
"""Marker or name; where it begins; where its content begins; where it ends."""


def is_plain(data: bytes, orientation: int) -> bool:
    """Whether every reader finds this orientation, 1 to 8, in a JPEG or PNG, and nothing that it may stumble over."""
    found = _parts(data)
    if found is None:
        return False
    if data.startswith(PNG) and not all(_is_sound(data, part) for part in found):
        return False
    blocks = _blocks(data, found)
    return len(blocks) <= 1 and orientation == (1 if not blocks else _orientation(blocks[0]))


def said(data: bytes) -> int:
    """The orientation of a JPEG or PNG by its EXIF block; 1 where there is none, several, or a broken one."""
    blocks = _blocks(data, _parts(data) or [])
    return (_orientation(blocks[0]) or 1) if len(blocks) == 1 else 1


def rewritten(data: bytes, orientation: int) -> bytes | None:
    """The same pixels, bit for bit, and beside them the orientation alone; None where the parts do not add up."""
    found = _parts(data)
    if found is None:
        return None
    tiff = struct.pack(">4sIHHHIHHI", b"MM\0*", 8, 1, _ORIENTATION, _SHORT, 1, orientation, 0, 0)
    if data.startswith(PNG):
        kept = [data[part[1] : part[3]] for part in found if part[0] in _BARE and _is_sound(data, part)]
        head, start, at = b"eXIf" + tiff, PNG, 1
        block = struct.pack(">I", len(tiff)) + head + struct.pack(">I", zlib.crc32(head))
    else:
        chosen = [part for part in found if _concerns_pixels(data, part)]
        kept = [data[part[1] : part[3]] for part in chosen]
        body, start, at = b"Exif\0\0" + tiff, data[:2], int(chosen[0][0] == _JFIF)
        block = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    return start + b"".join([*kept[:at], *([block] if orientation > 1 else []), *kept[at:]])


def _parts(data: bytes) -> list[Part] | None:
    """Segments of a JPEG, the last one all from its first scan on, or chunks of a PNG; None where they end early."""
    if data.startswith(PNG):
        return _complete(_chunks(data), b"IEND")
    return _complete(_segments(data), _SCAN) if data.startswith(b"\xff\xd8\xff") else None


def _complete(parts: Iterator[Part], last: int | bytes) -> list[Part] | None:
    found = list(parts)
    return found if found and found[-1][0] == last else None


def _segments(data: bytes) -> Iterator[Part]:
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker == _SCAN:
            yield marker, at, at + 4, len(data)
            return
        if end < at + 4 or end > len(data):
            return
        yield marker, at, at + 4, end
        at = end


def _chunks(data: bytes) -> Iterator[Part]:
    at = len(PNG)
    while at + 12 <= len(data):
        name, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield name, at, at + 8, end
        if name == b"IEND":
            return
        at = end


def _concerns_pixels(data: bytes, part: Part) -> bool:
    """Not so for what applications left, except how colours are coded; a broken JFIF or Adobe segment codes nothing."""
    marker, _, begin, end = part
    if marker == _JFIF:
        return data[begin : begin + 5] == b"JFIF\0" and end - begin >= 14
    if marker == _ADOBE:
        return data[begin : begin + 5] == b"Adobe" and end - begin >= 12
    return not (0xE0 <= int(marker) <= 0xEF or marker == _COMMENT)


def _is_sound(data: bytes, part: Part) -> bool:
    """Whether a chunk has the length of its kind and matches its checksum. Of animations readers may show anything."""
    name, begin, content, end = part
    size, colour = end - 4 - content, data[25]
    if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
        return True  # without them there is no picture: its decoder will say
    transparent = {0: size == 2, 2: size == 6, 3: 1 <= size <= 256}.get(colour, False)
    lengths = _LENGTHS | {b"bKGD": _BACKGROUND.get(colour), b"sBIT": _BITS.get(colour)}
    wrong = name in _ANIMATION or (name == b"tRNS" and not transparent) or size != lengths.get(bytes(name), size)
    return not wrong and zlib.crc32(data[begin + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")


def _blocks(data: bytes, parts: list[Part]) -> list[bytes]:
    """The contents of all EXIF blocks."""
    if data.startswith(PNG):
        return [data[content : end - 4] for name, _, content, end in parts if name == b"eXIf"]
    exif = [data[content:end] for name, _, content, end in parts if name == _EXIF]
    return [block[6:] for block in exif if block.startswith(b"Exif\0")]


def _orientation(tiff: bytes) -> int | None:
    """Of an EXIF block that is as the standard has it: 1 where it says nothing; None for any other block."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 14:
        return None
    (at,) = struct.unpack(f"{order}I", tiff[4:8])
    if not 8 <= at <= len(tiff) - 6:
        return None
    (count,) = struct.unpack(f"{order}H", tiff[at : at + 2])
    if at + 2 + 12 * count + 4 > len(tiff):
        return None
    entries = [struct.unpack(f"{order}HHIH", tiff[k : k + 10]) for k in range(at + 2, at + 2 + 12 * count, 12)]
    found = [entry[1:] for entry in entries if entry[0] == _ORIENTATION]
    if not found:
        return 1
    kind, values, value = found[0]
    if (kind, values, len(found)) != (_SHORT, 1, 1) or value > 8:
        return None
    return value or 1  # 0, as some cameras have it, is read as nothing said
