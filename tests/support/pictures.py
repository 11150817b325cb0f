"""Images that tests make for themselves."""

import io
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image


def photo(seed, height=40, width=60, mode="RGB"):
    """A smooth picture, as photographs are: noise of few pixels, enlarged."""
    values = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def gray16(seed, height=40, width=60, white=65535):
    """A smooth gray picture with values from 0 to `white`: (height, width) uint16."""
    values = np.random.default_rng(seed).random((5, 7), dtype=np.float32)
    smooth = np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return np.rint(white * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint16)


def encoded(image, kind="JPEG", **options):
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def folder(root, per_class=4, classes=("bird", "cat", "dog"), **shape):
    """An image folder; returns {key: bytes}."""
    files = {}
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            data = encoded(photo(100 * label + index, **shape), "PNG" if index % 2 else "JPEG")
            key = f"{name}/{index}.{'png' if index % 2 else 'jpg'}"
            (root / key).write_bytes(data)
            files[key] = data
    return files


def tar_of(path, members):
    """A tar of {name: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def deep_png(image):
    """A colour PNG of 16 bits per channel, which Pillow cannot write."""
    pixels = np.asarray(image.convert("RGB")).astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", image.width, image.height, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
