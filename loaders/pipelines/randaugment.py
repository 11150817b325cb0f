"""RandAugment (arXiv 1909.13719) on the host, with the operations and magnitudes that DALI's suite has."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from loaders.pipelines.transform import FILL, MAX_TRANSLATE, RANDAUGMENT_OPS

BINS = 30
"""The largest magnitude M."""
_ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


def apply_randaugment(image: Image.Image, choices: np.ndarray, magnitude: int) -> Image.Image:
    """Apply the operations chosen for this sample, (N, 2) operation number and sign, to an RGB image."""
    for number, minus in choices.tolist():
        image = _apply(image, RANDAUGMENT_OPS[number], magnitude / BINS, -1 if minus else 1)
    return image


def _apply(image: Image.Image, name: str, strength: float, sign: int) -> Image.Image:
    width, height = image.size
    if name in _ENHANCE:
        return _ENHANCE[name](image).enhance(1 + sign * 0.9 * strength)
    if name == "shear_x":
        return warp(image, (1, -sign * 0.3 * strength, 0, 0, 1, 0), FILL)
    if name == "shear_y":
        return warp(image, (1, 0, 0, -sign * 0.3 * strength, 1, 0), FILL)
    if name == "translate_x":
        return warp(image, (1, 0, -sign * MAX_TRANSLATE * strength * width, 0, 1, 0), FILL)
    if name == "translate_y":
        return warp(image, (1, 0, 0, 0, 1, -sign * MAX_TRANSLATE * strength * height), FILL)
    if name == "rotate":
        angle = math.radians(sign * 30 * strength)
        cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
        return warp(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y), FILL)
    if name == "posterize":
        return ImageOps.posterize(image, round(8 - 4 * strength))
    if name == "solarize":
        return ImageOps.solarize(image, 256 - 256 * strength)  # type: ignore[arg-type]  # any number is compared
    if name == "auto_contrast":
        return ImageOps.autocontrast(image)
    return ImageOps.equalize(image) if name == "equalize" else image


def warp_reflected(image: Image.Image, matrix: Sequence[float]) -> Image.Image:
    """As `warp`; what lies outside is the mirror image, in which the border pixels are not repeated."""
    a, b, c, d, e, f = matrix
    width, height = image.size
    across = [a * x + b * y + c for x in (0, width) for y in (0, height)]
    down = [d * x + e * y + f for x in (0, width) for y in (0, height)]
    reach = math.ceil(max(0, -min(across), -min(down), max(across) - width, max(down) - height)) + 1
    pixels = np.asarray(image)
    padded = np.pad(pixels, [(reach, reach)] * 2 + [(0, 0)] * (pixels.ndim - 2), mode="reflect")
    shifted = (a, b, c + reach, d, e, f + reach)
    return Image.fromarray(padded).transform(
        (width, height), Image.Transform.AFFINE, shifted, Image.Resampling.BILINEAR
    )


def warp(image: Image.Image, matrix: Sequence[float], fill: int) -> Image.Image:
    """Bilinear affine warp of an RGB or float image: output pixel (x, y) comes from (a x + b y + c, d x + e y + f).

    `matrix` is (a, b, c, d, e, f) with pixel centres at n + 0.5. A frame of `fill` makes the edge fade into it as in
    DALI; Pillow by itself cuts it hard.
    """
    colour = (fill,) * 3 if image.mode == "RGB" else fill
    framed = ImageOps.expand(image, 1, colour)
    a, b, c, d, e, f = matrix
    shifted = (a, b, c + 1, d, e, f + 1)
    return framed.transform(image.size, Image.Transform.AFFINE, shifted, Image.Resampling.BILINEAR, fillcolor=colour)
