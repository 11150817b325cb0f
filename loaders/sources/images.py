"""Looks at one encoded image while packing: decodes it once, and re-encodes what a pipeline could not take as it is."""

import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from loaders.sources import metadata

JPEG_QUALITY = 95
PNG_LEVEL = 2
"""Of zlib, for what a source decoded: far faster than its usual 6, and hardly larger on radiographs."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, how the stored pixels are turned to be displayed."""
_METADATA = "without metadata that readers take differently"
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
    """What goes into the pack: a JPEG or PNG with 8 bits per channel, or a gray PNG with 16. It says how it is turned
    in one EXIF block that all readers take alike, or not at all."""
    height: int
    """Pixels, as displayed (orientation applied)."""
    width: int
    """Pixels, as displayed."""
    change: str = ""
    """Why the bytes are not those of the source; empty where they are."""


def check_image(data: bytes, resize: int | None = None, quality: int = JPEG_QUALITY) -> Checked:
    """Decode an image fully; with `resize`, re-encode one whose short side is longer than that many pixels.

    JPEG (gray or colour), 8-bit PNG and 16-bit gray PNG are kept byte for byte, but where readers differ on what such a
    file says beside its pixels, or fail over it: then pixels and orientation alone are kept. CMYK JPEGs become RGB
    JPEGs (GPU decoders differ on them), colour PNG of 16 bits becomes PNG of 8, any other format PNG. Gray of 16 bits
    stays so.
    Raises ValueError with the reason if it does not decode.
    """
    opened, orientation, failed = _decoded(data)
    kind, mode = opened.format, opened.mode
    image = opened.transpose(_TURNS[orientation]) if orientation in _TURNS else opened
    # Pillow shows colour of 16 bits as colour of 8; other decoders need not.
    reduced = bits_per_channel(data) > 8 and mode != "I;16"
    keep = mode in _KEPT.get(kind or "", ()) and not reduced
    shrink = resize if resize is not None and min(image.size) > resize else 0
    if keep and not shrink:
        if not failed and metadata.is_plain(data, orientation):
            return Checked(data, image.height, image.width)
        if plain := metadata.rewritten(data, orientation):
            return Checked(plain, image.height, image.width, _METADATA)
    if shrink:
        change = "resized"
    elif keep:  # Pillow sees through what is between its parts; other decoders need not
        change = f"{kind} whose parts do not add up"
    else:
        change = f"{kind} of mode {mode}" + (", 16 bits" if reduced else "")
    image = _remade(image, shrink)
    buffer = BytesIO()
    if kind in ("JPEG", "MPO"):
        image.save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "PNG")
    return Checked(buffer.getvalue(), image.height, image.width, change)


def encode_image(image: Image.Image, resize: int | None = None) -> Checked:
    """What a source decoded itself, gray of 8 or 16 bits or RGB, as PNG; `resize` as for `check_image`."""
    shrink = resize if resize is not None and min(image.size) > resize else 0
    image = _remade(image, shrink) if shrink else image
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return Checked(buffer.getvalue(), image.height, image.width, "resized" if shrink else "")


def _remade(image: Image.Image, shrink: int) -> Image.Image:
    """Bare; with `shrink`, of that short side."""
    image = _bare(image)
    if shrink:
        short = min(image.size)
        image = image.resize(
            (max(1, round(image.width * shrink / short)), max(1, round(image.height * shrink / short))),
            Image.Resampling.BICUBIC,
        )
    if image.mode == "F":
        image = Image.fromarray(np.rint(np.asarray(image)).clip(0, 65535).astype(np.uint16))
    return image


def _decoded(data: bytes) -> tuple[Image.Image, int, bool]:
    """The pixels as they are stored; the orientation, 1 to 8; and whether what is said beside the pixels is unreadable.

    Pillow's reading of EXIF and XMP counts, where it can read them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata
        try:
            image, orientation = _loaded(data)
        except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
            bare = metadata.rewritten(data, 1)
            try:
                image, orientation = _loaded(bare or b"")[0], None
            except Exception:
                raise ValueError(_reason(data, error)) from error
    failed = orientation is None
    orientation = metadata.said(data) if orientation is None else orientation
    return image, orientation if orientation in _TURNS else 1, failed


def _loaded(data: bytes) -> tuple[Image.Image, int | None]:
    """The image, and its orientation; None where this cannot be read."""
    with Image.open(BytesIO(data)) as opened:
        opened.load()
        try:
            return opened, opened.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # as of broken pixels
            return opened, None


def bits_per_channel(data: bytes) -> int:
    """Of an encoded image in a pack: 16 for a PNG that says so, else 8."""
    return 16 if data.startswith(metadata.PNG) and data[_PNG_DEPTH : _PNG_DEPTH + 1] == b"\x10" else 8


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
