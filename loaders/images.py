"""Looks at one encoded image while packing: decodes it once, and re-encodes what a pipeline could not take as it is."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

JPEG_QUALITY = 95
_PNG_DEPTH = 24  # byte of a PNG that tells the bits per channel
_KEPT = {
    "JPEG": ("L", "RGB"),
    "MPO": ("L", "RGB"),  # a JPEG followed by further pictures
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
}


@dataclass(frozen=True)
class Checked:
    """An image that decodes."""

    data: bytes
    """What goes into the pack: a JPEG or PNG with 8 bits per channel."""
    height: int
    """Pixels, as displayed (EXIF orientation applied)."""
    width: int
    """Pixels, as displayed."""
    change: str = ""
    """Why the bytes are not those of the source; empty where they are."""


def check_image(data: bytes, resize: int | None = None, quality: int = JPEG_QUALITY) -> Checked:
    """Decode an image fully; with `resize`, re-encode one whose short side is longer than that many pixels.

    JPEG (gray or colour) and 8-bit PNG are kept byte for byte. CMYK JPEGs become RGB JPEGs (GPU decoders differ on
    them), PNG of 16 bits becomes PNG of 8, any other format PNG. Raises ValueError with the reason if it does not
    decode.
    """
    try:
        with Image.open(BytesIO(data)) as opened:
            opened.load()
            kind, mode = opened.format, opened.mode
            image = ImageOps.exif_transpose(opened)
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        raise ValueError(_reason(data, error)) from error
    deep = kind == "PNG" and data[_PNG_DEPTH] > 8  # Pillow shows RGB of 16 bits as RGB of 8; other decoders need not
    keep = mode in _KEPT.get(kind, ()) and not deep
    shrink = resize is not None and min(image.size) > resize
    if keep and not shrink:
        return Checked(data, image.height, image.width)
    change = "resized" if shrink else f"{kind} of mode {mode}" + (", 16 bits" if deep and ";16" not in mode else "")
    image = _eight_bit(image)
    if shrink:
        short = min(image.size)
        image = image.resize(
            tuple(max(1, round(side * resize / short)) for side in image.size), Image.Resampling.BICUBIC
        )
    buffer = BytesIO()
    if kind in ("JPEG", "MPO"):
        image.save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "PNG")
    return Checked(buffer.getvalue(), image.height, image.width, change)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Gray or RGB with 8 bits, without transparency or metadata."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
    if image.mode == "F":
        return Image.fromarray(np.rint(np.asarray(image).clip(0, 255)).astype(np.uint8))
    bare = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    bare.info = {}
    return bare


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in a format that Pillow knows"
    return str(error) or type(error).__name__
