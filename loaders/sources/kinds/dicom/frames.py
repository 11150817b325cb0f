"""The pixels of a frame as they are stored, through pydicom's decoders and their plug-ins."""

import functools
import io
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from loaders.sources.kinds.dicom.reading import (
    EXPLICIT,
    IMAGE,
    Tags,
    Unusable,
    library,
    opened,
    read_tags,
    usable,
)

KINDS = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
"""Photometric interpretations that become gray or RGB; the first three have one sample per pixel."""
_IMPLICIT, _BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
_PIXELS = {(0x7FE0, 0x10): "PixelData", (0x7FE0, 8): "FloatPixelData", (0x7FE0, 9): "DoubleFloatPixelData"}
_LONG = ("OB", "OW", "OF", "OD", "UN")  # VRs of pixels, after which two empty bytes and the length stand
_UNDEFINED = 0xFFFFFFFF
_MOST_PIXELS = 178_956_970  # of a frame: what Pillow, which decodes the packs, takes at most
_SMALL, _MOST_TIMES = 1 << 24, 1000  # bytes that any frame may have; else so many times its compressed ones
_SIZES = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7))
_PALETTE = tuple(f"{of}{color}PaletteColorLookupTable{part}" for color in ("Red", "Green", "Blue")
                 for of, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data")))  # fmt: skip
_SHOWN = ("PlanarConfiguration", "NumberOfFrames", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope",
          "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
          "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelPresentation",
          "ExtendedOffsetTable", "ExtendedOffsetTableLengths", *_PALETTE)  # fmt: skip


def frame(path: str, index: int) -> tuple[np.ndarray, Tags, str]:
    """The values of frame `index` as they are stored, (height, width) or, as RGB, (height, width, 3); the header of the
    file; and what the values are: MONOCHROME1, MONOCHROME2, PALETTE COLOR or RGB.

    Unusable with the reason; OSError where the state of the machine keeps the file from being read.
    """
    with usable("its header cannot be read"):
        about = os.stat(path)
        header = _header(path, about.st_size, about.st_mtime_ns, about.st_ino)
    with usable("its pixels cannot be decoded", saying=True), opened(path) as file:
        values, done = _decoded(file, header, index)
    return values, header.tags, str(done["photometric_interpretation"])


@dataclass(frozen=True)
class _Header:
    """What decoding the frames of a file needs."""

    tags: Tags
    at: int
    """First byte of the pixels; of encapsulated ones, of their offset table."""
    length: int
    """Bytes from there that are theirs."""
    encapsulated: bool
    keyword: str
    vr: str
    syntax: str


@functools.lru_cache(maxsize=1)  # the frames of a file are packed one after the other
def _header(path: str, size: int, changed: int, number: int) -> _Header:
    with opened(path) as file:
        tags = read_tags(file, (*IMAGE, *_SHOWN))
        start = file.tell()
        head = file.read(12)
        end = file.seek(0, os.SEEK_END)
    implicit, little = tags.original_encoding
    told = str(getattr(tags, "file_meta", {}).get("TransferSyntaxUID") or "")
    syntax = told or (_BIG if not little else _IMPLICIT if implicit else EXPLICIT)
    order = ">" if syntax == _BIG else "<"
    keyword = _PIXELS.get(struct.unpack(f"{order}HH", head[:4])) if len(head) == 12 else None
    if keyword is None:
        raise Unusable("it has no pixels, or its header ends early")
    vr = head[4:6].decode("latin-1")
    long = vr in _LONG
    (length,) = struct.unpack(f"{order}L", head[8:] if long else head[4:8])
    at = start + (12 if long else 8)
    there = end - at if length == _UNDEFINED else min(length, end - at)
    return _Header(tags, at, there, length == _UNDEFINED, keyword, vr if long else "OW", syntax)


def _decoded(file: io.BufferedIOBase, header: _Header, index: int) -> tuple[np.ndarray, dict[str, Any]]:
    dicom = library()
    uid = dicom.uid.UID(header.syntax)
    name = uid.name if uid.name != str(uid) else "of an unknown name"
    try:
        decoder = dicom.pixels.get_decoder(uid)
    except NotImplementedError as error:
        raise Unusable(f"pydicom has no decoder for its transfer syntax, {name}") from error
    if decoder.is_encapsulated != header.encapsulated:
        compressed = "compressed" if header.encapsulated else "not compressed"
        raise Unusable(f"its pixels are {compressed}, its transfer syntax is {name}")
    options = dicom.pixels.as_pixel_options(header.tags, pixel_keyword=header.keyword, pixel_vr=header.vr)
    bits = _bits(options)
    file.seek(header.at)
    if not header.encapsulated:
        _check_there(options, header, bits, index)
        return decoder.as_array(file, index=index, **options)
    offsets, frames = options.pop("extended_offsets", None), options.pop("number_of_frames")
    data = dicom.encaps.get_frame(file, index, extended_offsets=offsets, number_of_frames=frames)
    if bits // 8 > max(_SMALL, _MOST_TIMES * len(data)):
        raise Unusable(f"its header asks for {bits // 8:,} bytes of pixels, of {len(data):,} compressed ones")
    size = _codestream_size(data)
    if size and size != (options["rows"], options["columns"]):
        said = f"its header says {options['rows']} by {options['columns']} pixels"
        raise Unusable(f"{said}, its compressed image {size[0]} by {size[1]}")
    return decoder.as_array(dicom.encaps.encapsulate([data]), index=0, number_of_frames=1, **options)


def _bits(options: dict[str, Any]) -> int:
    """Of a frame that is not compressed. Unusable where what describes it is missing, contradictory or too much."""
    for name in ("rows", "columns", "samples_per_pixel", "bits_allocated"):
        if not isinstance(options.get(name), int):
            raise Unusable(f"its header has no {name.replace('_', ' ')}")
    rows, columns, samples = options["rows"], options["columns"], options["samples_per_pixel"]
    kind = str(options.get("photometric_interpretation") or "")
    if kind not in KINDS:
        said = "one that is not known here" if kind else "missing"
        raise Unusable(f"its photometric interpretation is {said}; expected {', '.join(KINDS)}")
    if samples != (1 if kind in KINDS[:3] else 3):
        raise Unusable(f"its header says {kind}, with {samples} samples per pixel")
    if rows * columns > _MOST_PIXELS:
        raise Unusable(f"its header says {rows:,} by {columns:,} pixels; up to {_MOST_PIXELS:,} are possible")
    return rows * columns * samples * options["bits_allocated"]


def _check_there(options: dict[str, Any], header: _Header, bits: int, index: int) -> None:
    """Unusable where pixels that are not compressed are fewer than, or otherwise than, the header says."""
    stored, highest = options.get("bits_stored"), header.tags.get("HighBit")
    if isinstance(stored, int) and isinstance(highest, int) and highest != stored - 1:
        raise Unusable(f"its highest bit is {highest}, of {stored} bits stored; expected {stored - 1}")
    halved = options["photometric_interpretation"] == "YBR_FULL_422"
    if halved and header.length >= options["number_of_frames"] * bits // 8:
        raise Unusable("its header says YBR_FULL_422, and its pixels are too many for that")
    needed = -(-(index + 1) * (bits * 2 // 3 if halved else bits) // 8)
    if needed > header.length:
        raise Unusable(f"its pixels end early: {header.length:,} bytes of {needed:,}")


def _codestream_size(data: bytes) -> tuple[int, int] | None:
    """Height and width by a JPEG, JPEG-LS or JPEG 2000 image itself: for these a decoder takes memory; else None.
    ITU-T T.81, B.2.2; T.87, C.2.2; T.800, A.5.1."""
    at = data.find(b"\xff\x4f\xff\x51")
    if at >= 0:
        width, height, left, top = struct.unpack(">4L", data[at + 8 : at + 24])
        return height - top, width - left
    at = 2
    while data.startswith(b"\xff\xd8") and at + 9 <= len(data) and data[at] == 0xFF:
        if data[at + 1] in _SIZES:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return height, width
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
