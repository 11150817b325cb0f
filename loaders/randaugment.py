"""RandAugment (arXiv 1909.13719) on the host, with the operations and magnitudes that DALI's suite has."""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from loaders.transform import RANDAUGMENT_OPS

FILL = 128
"""What lies outside the image after a shear, translation or rotation."""
MAX_TRANSLATE = 100 / 224
"""Largest translation, as a fraction of the side."""
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
        return _warp(image, (1, -sign * 0.3 * strength, 0, 0, 1, 0))
    if name == "shear_y":
        return _warp(image, (1, 0, 0, -sign * 0.3 * strength, 1, 0))
    if name == "translate_x":
        return _warp(image, (1, 0, -sign * MAX_TRANSLATE * strength * width, 0, 1, 0))
    if name == "translate_y":
        return _warp(image, (1, 0, 0, 0, 1, -sign * MAX_TRANSLATE * strength * height))
    if name == "rotate":
        return image.rotate(sign * 30 * strength, Image.Resampling.BILINEAR, fillcolor=(FILL,) * 3)
    if name == "posterize":
        return ImageOps.posterize(image, round(8 - 4 * strength))
    if name == "solarize":
        return ImageOps.solarize(image, 256 - 256 * strength)
    if name == "auto_contrast":
        return ImageOps.autocontrast(image)
    return ImageOps.equalize(image) if name == "equalize" else image


def _warp(image: Image.Image, matrix: tuple) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(FILL,) * 3)
