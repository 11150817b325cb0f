"""DICOM files through pydicom (https://pydicom.github.io): what is one, and who and what is in it.

What a header says of sizes is held against the file before memory is taken. What is said of a file that cannot be used
goes into packs, so it has nothing of the header but numbers and words of the standard. DICOM: PS3.3, PS3.5, PS3.10.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loaders.errors import UserError, is_passing
from loaders.sources.listing import at_once

INSTALL = "pip install pydicom pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
EXPLICIT = "1.2.840.10008.1.2.1"
"""UID of the transfer syntax Explicit VR Little Endian."""
IMAGE = ("Rows", "Columns", "BitsAllocated", "SamplesPerPixel", "PhotometricInterpretation")
"""What every image says."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_HEAD = 1 << 16
_PREAMBLE, _MAGIC = 128, b"DICM"
_MOST_INFLATED = 1 << 29  # bytes of a deflated file
_SAID = 200  # characters of a library's words
_WHO = ("PatientID", "StudyInstanceUID", "SOPInstanceUID", "SOPClassUID", "NumberOfFrames", "BurnedInAnnotation",
        "PresentationLUTShape", "VOILUTSequence", "WindowCenter", "WindowWidth",
        "SharedFunctionalGroupsSequence")  # fmt: skip
Tags = Any
"""A pydicom.Dataset."""


class Unusable(ValueError):
    """Why a file cannot be used, in words that tell nobody's name."""


@dataclass(frozen=True)
class Heading:
    """What a file says of its image."""

    patient: str
    study: str
    instance: str
    """Identifiers, as they are; empty where there are none."""
    frames: int
    syntax: str
    """UID of the transfer syntax; empty where none is told."""
    windowed: bool
    """Whether it says which values are black and white, or need not (colour)."""
    burned_in: bool
    """Whether it says that text is burned into the pixels."""
    contradictory: bool
    """Whether its presentation LUT shape says the opposite of its photometric interpretation."""


def library() -> Any:
    """pydicom. UserError where it is missing."""
    try:
        import pydicom
        import pydicom.encaps
        import pydicom.pixels
    except ImportError as error:
        raise UserError(f"DICOM needs pydicom and, for compressed images, its plug-ins: {INSTALL}") from error
    return pydicom


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as DICOM does. False, too, for what cannot be read."""
    try:
        with _Bounded(path) as file:
            return _begins(file.read(_PREAMBLE + len(_MAGIC))) == "file"
    except (OSError, Unusable):
        return False


def heading(path: str) -> Heading | None:
    """What a file says of its image; None for what is no DICOM, or DICOM without an image (reports, plans, DICOMDIR).

    Unusable with the reason for DICOM that cannot be read; OSError where the state of the machine keeps it from that.
    """
    with usable("its header cannot be read"):
        with _Bounded(path) as file:
            begins = _begins(file.read(_PREAMBLE + len(_MAGIC)))
        if not begins:
            return None
        try:
            with opened(path) as source:
                tags = read_tags(source, (*IMAGE, *_WHO))
        except Exception:
            if begins == "file":
                raise
            return None  # it only looked like DICOM
        meta = getattr(tags, "file_meta", {})
        if any(name in tags for name in IMAGE):
            return _heading(tags, meta, os.stat(path).st_size)
        storage = str(meta.get("MediaStorageSOPClassUID") or tags.get("SOPClassUID") or "")
        if begins == "file" and _is_of_images(storage):
            raise Unusable("its header ends early, or has no rows and columns")
        return None


def _heading(tags: Tags, meta: Any, size: int) -> Heading:
    frames = int(tags.get("NumberOfFrames") or 1)
    if not 0 < frames <= size // 8:
        raise Unusable(f"it says that it has {frames:,} frames, in {size:,} bytes")
    kind, shape = str(tags.get("PhotometricInterpretation")), str(tags.get("PresentationLUTShape") or "").upper()
    window = [tags.get(name) not in (None, "") for name in ("WindowCenter", "WindowWidth")]
    # Of an enhanced image the window may stand with each frame.
    told = all(window) or bool(tags.get("VOILUTSequence")) or bool(tags.get("SharedFunctionalGroupsSequence"))
    return Heading(
        patient=str(tags.get("PatientID") or "").strip(),
        study=str(tags.get("StudyInstanceUID") or "").strip(),
        instance=str(tags.get("SOPInstanceUID") or meta.get("MediaStorageSOPInstanceUID") or "").strip(),
        frames=frames,
        syntax=str(meta.get("TransferSyntaxUID") or ""),
        windowed=told or not kind.startswith("MONOCHROME"),
        burned_in=str(tags.get("BurnedInAnnotation") or "").upper() == "YES",
        contradictory=(kind, shape) in (("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")),
    )


@contextlib.contextmanager
def usable(what: str, saying: bool = False) -> Iterator[None]:
    """Around what reads a file: whatever its bytes lead to becomes Unusable, with `saying` in the words of the library.
    What the state of the machine is to blame for passes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is told here, without the values
            yield
    except (UserError, Unusable):
        raise
    except OSError as error:
        if is_passing(error):
            raise
        raise Unusable(os.strerror(error.errno) if error.errno else what) from error
    except BaseException as error:  # over damaged bytes parsers raise nearly anything, those in Rust a panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:_SAID] if saying else ""
        raise Unusable(f"{what} ({said or type(error).__name__})") from error


def opened(path: str) -> io.BufferedIOBase:
    """The file; a deflated one inflated, in memory."""
    file = _Bounded(path)
    head = file.read(_HEAD)
    file.seek(0)
    if not (head[_PREAMBLE:].startswith(_MAGIC) and _DEFLATED in head):
        return file
    with file:
        file.seek(144 + int.from_bytes(head[140:144], "little"))  # behind the meta information, of that length
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        data = inflate.decompress(file.read(_MOST_INFLATED), _MOST_INFLATED)
    if inflate.unconsumed_tail:
        raise Unusable(f"it inflates to more than {_MOST_INFLATED:,} bytes")
    syntax = struct.pack("<HH2sH", 2, 0x10, b"UI", len(EXPLICIT) + 1) + EXPLICIT.encode() + b"\0"
    return io.BytesIO(head[:_PREAMBLE] + _MAGIC + syntax + data)


def read_tags(file: io.BufferedIOBase, names: tuple[str, ...]) -> Tags:
    """These elements of the header; the file is then where its pixels begin, or at its end."""
    return library().dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(names))


class _Bounded(io.BufferedReader):
    """A file of which no more is asked than there is: a damaged length takes no memory."""

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(io.FileIO(path, opener=at_once), _HEAD)
        about = os.fstat(self.fileno())
        if not stat.S_ISREG(about.st_mode):
            self.close()
            raise Unusable("it is no file, but a pipe, a socket or a device")
        self._size = about.st_size

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # as pydicom reads what it inflates
            raise Unusable("it is deflated, and says so where that is not expected")
        return super().read(min(size, max(self._size - self.tell(), 0)))


def _begins(data: bytes) -> str:
    """file: as a DICOM file does; elements: as one without its preamble may; else empty."""
    if data[_PREAMBLE:].startswith(_MAGIC):
        return "file"
    group, explicit = data[:2], data[4:6].isalpha() and data[4:6].isupper()
    little = group in (b"\2\0", b"\10\0") and data[3:4] == b"\0"
    big = group in (b"\0\2", b"\0\10") and data[2:3] == b"\0" and explicit
    return "elements" if little or big else ""


def _is_of_images(storage: str) -> bool:
    """Whether a SOP class is one of images, as unknown ones may be."""
    name = library().uid.UID(storage).name
    return name == storage or "Image" in name
