"""Looks at one encoded image while packing: decodes it once, and re-encodes what a pipeline could not take as it is."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

JPEG_QUALITY = 95
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH = 24  # byte of a PNG that tells the bits per channel
_KEPT = {
    "JPEG": ("L", "RGB"),
    "MPO": ("L", "RGB"),  # a JPEG followed by further pictures
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
}


@dataclass(frozen=True)
class Checked:
    """An image that decodes."""

    data: bytes
    """What goes into the pack: a JPEG or PNG with 8 bits per channel, or a gray PNG with 16."""
    height: int
    """Pixels, as displayed (EXIF orientation applied)."""
    width: int
    """Pixels, as displayed."""
    change: str = ""
    """Why the bytes are not those of the source; empty where they are."""


def check_image(data: bytes, resize: int | None = None, quality: int = JPEG_QUALITY) -> Checked:
    """Decode an image fully; with `resize`, re-encode one whose short side is longer than that many pixels.

    JPEG (gray or colour), 8-bit PNG and 16-bit gray PNG are kept byte for byte. CMYK JPEGs become RGB JPEGs (GPU
    decoders differ on them), colour PNG of 16 bits becomes PNG of 8, any other format PNG. Gray of 16 bits stays so.
    Raises ValueError with the reason if it does not decode.
    """
    try:
        with Image.open(BytesIO(data)) as opened:
            opened.load()
            kind, mode = opened.format, opened.mode
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        raise ValueError(_reason(data, error)) from error
    # Pillow shows colour of 16 bits as colour of 8; other decoders need not.
    reduced = bits_per_channel(data) > 8 and mode != "I;16"
    keep = mode in _KEPT.get(kind or "", ()) and not reduced
    shrink = resize if resize is not None and min(image.size) > resize else 0
    if keep and not shrink:
        return Checked(data, image.height, image.width)
    change = "resized" if shrink else f"{kind} of mode {mode}" + (", 16 bits" if reduced else "")
    image = _bare(image)
    if shrink:
        short = min(image.size)
        image = image.resize(
            (max(1, round(image.width * shrink / short)), max(1, round(image.height * shrink / short))),
            Image.Resampling.BICUBIC,
        )
    if image.mode == "F":
        image = Image.fromarray(np.rint(np.asarray(image)).clip(0, 65535).astype(np.uint16))
    buffer = BytesIO()
    if kind in ("JPEG", "MPO"):
        image.save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "PNG")
    return Checked(buffer.getvalue(), image.height, image.width, change)


def bits_per_channel(data: bytes) -> int:
    """Of an encoded image in a pack: 16 for a PNG that says so, else 8."""
    return 16 if data.startswith(_PNG) and data[_PNG_DEPTH : _PNG_DEPTH + 1] == b"\x10" else 8


def _bare(image: Image.Image) -> Image.Image:
    """Gray or RGB with 8 bits, or gray of 16 bits as float32, without transparency or metadata."""
    if image.mode.startswith("I"):
        return Image.fromarray(np.asarray(image).clip(0, 65535).astype(np.float32))  # Pillow wraps when it resizes I;16
    if image.mode == "F":
        return Image.fromarray(np.rint(np.asarray(image).clip(0, 255)).astype(np.uint8))
    bare = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    bare.info = {}
    return bare


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that Pillow knows"
    return str(error) or type(error).__name__
