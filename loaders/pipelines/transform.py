"""What happens to an image between its bytes and the network: one description that drives DALI and the host alike.

window of the displayed image → resize to (size, size) → flip → RandAugment or affine →
(x / 255 - mean) / std, with 65535 for gray of 16 bits. Windows, flips and matrices are computed here, in NumPy, from
the plan's uniform numbers, so an augmented sample does not depend on the pipeline, the number of ranks, or a restart.

Columns of the draws: 0–19 area and aspect ratio of the ten attempts of a random resized crop (alternating);
20, 21 vertical and horizontal position; 22 flip; 23 rotation; 24 scale; 25, 26 horizontal and vertical
translation; 27–38 operation and sign of up to six RandAugment operations (alternating); 39 free.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loaders.errors import UserError

Channels = tuple[float, float, float]
"""A value for red, green and blue."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
KINDS = ("random_resized_crop", "random_crop", "random_short_crop", "center_crop", "resize", "xray")
OUTSIDE = ("black", "reflect")
DOWNSCALE = ("linear", "area")
RANDAUGMENT_OPS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "auto_contrast", "equalize",
)  # fmt: skip
FILL = 128
"""What lies outside an image after a shear, translation or rotation of RandAugment."""
MAX_TRANSLATE = 100 / 224
"""Its largest translation, as a fraction of the side."""
_ATTEMPTS = 10
_POSITION, _FLIP, _ROTATION, _SCALE, _SHIFT, _RANDAUGMENT, _LAST = 20, 22, 23, 24, 25, 27, 39


@dataclass(frozen=True)
class Affine:
    """Ranges of a random similarity transform about the image centre."""

    rotation: float = 45.0
    """Degrees; the angle is uniform in ±rotation."""
    scale: tuple[float, float] = (0.9, 1.1)
    """Uniform range of magnification."""
    translate: float = 0.15
    """Fraction of the size; each axis is uniform in ±translate."""
    outside: str = "black"
    """What lies outside the image: `black`, or `reflect`: its mirror image, in which the border pixels are not
    repeated (NumPy's reflect, OpenCV's BORDER_REFLECT_101)."""

    def __post_init__(self) -> None:
        if self.outside not in OUTSIDE:
            raise UserError(f"unknown outside {self.outside!r}; there are {', '.join(OUTSIDE)}")


@dataclass(frozen=True)
class Transform:
    """See the module. Check with `windows`, `flips`, `matrices`, `randaugment_choices`."""

    kind: str
    """The window: `random_resized_crop` (torchvision's), `random_crop` (resize to a square of side `resize`, crop
    `size` at random), `random_short_crop` (short side to `resize`, crop `size` at random), `center_crop` (short side
    to `resize`, crop the centre), `resize` (the whole image, aspect not kept), `xray` (the centre square, in gray)."""
    size: int
    """Side of the output in pixels."""
    resize: int | None = None
    """Side before the crop in pixels, for `random_crop`, `random_short_crop` and `center_crop`; default: `size`."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the fraction of the area, for `random_resized_crop`."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of width / height, log-uniform, for `random_resized_crop`."""
    flip: bool = False
    """Mirror horizontally with probability 1/2."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted per channel, of values in 0..1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divided by per channel, of values in 0..1."""
    affine: Affine | None = None
    """Random rotation, scale and translation, or none."""
    randaugment: tuple[int, int] | None = None
    """(N, M): N operations per image, 1 to 6, of magnitude M in 0..30; or none."""
    downscale: str = "linear"
    """How a window of at least `size` pixels a side becomes smaller: `linear`, with antialiasing, or `area`: means over
    areas, as OpenCV's INTER_AREA. Smaller windows are enlarged bilinearly."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown transform {self.kind!r}; there are {', '.join(KINDS)}")
        if self.downscale not in DOWNSCALE:
            raise UserError(f"unknown downscale {self.downscale!r}; there are {', '.join(DOWNSCALE)}")
        if self.size < 1 or self.before_crop < self.size:
            raise UserError(f"cannot crop {self.size} pixels out of {self.before_crop}")
        if not 0 < self.scale[0] <= self.scale[1] or not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"scale {self.scale} and ratio {self.ratio} must be positive ranges")
        if self.randaugment is not None:
            operations, magnitude = self.randaugment
            if not 1 <= operations <= (_LAST - _RANDAUGMENT) // 2 or not 0 <= magnitude <= 30:
                raise UserError(f"randaugment {self.randaugment}: N must be 1 to 6 and M 0 to 30")

    @property
    def before_crop(self) -> int:
        """Side before the crop in pixels."""
        return self.size if self.resize is None else self.resize

    @property
    def gray(self) -> bool:
        """Whether one channel is repeated to three, as the protocol has it for X-rays; colour becomes gray."""
        return self.kind == "xray"

    def normalization(self, white: float) -> tuple[np.ndarray, np.ndarray]:
        """What to multiply a pixel of 0..white by, and what to add then: two of (3,) float32."""
        mean, std = np.array(self.mean), np.array(self.std)
        return (1 / (white * std)).astype(np.float32), (-mean / std).astype(np.float32)

    @property
    def random(self) -> bool:
        """Whether the draws matter."""
        return self.kind.startswith("random_") or self.flip or self.affine is not None or self.randaugment is not None


_FIXED = ("kind", "size", "resize", "mean", "std", "downscale")


def as_fields(transform: Transform) -> dict[str, Any]:
    """An evaluation transform, nothing random, as JSON can have it."""
    return {name: getattr(transform, name) for name in _FIXED}


def from_fields(fields: Mapping[str, Any]) -> Transform:
    """What `as_fields` made this of, also by way of JSON."""
    mean, std = ((float(r), float(g), float(b)) for r, g, b in (fields["mean"], fields["std"]))
    return Transform(**{name: fields[name] for name in _FIXED} | {"mean": mean, "std": std})


def natural_train(size: int = 224, randaugment: tuple[int, int] | None = None) -> Transform:
    """Pre-training on natural images: random resized crop and flip, ImageNet statistics."""
    return Transform("random_resized_crop", size, flip=True, randaugment=randaugment)


def natural_eval(size: int = 224, resize: int | None = None) -> Transform:
    """Evaluation on natural images: short side to `resize` (size · 256 / 224), centre crop."""
    return Transform("center_crop", size, resize=resize or round(size * 256 / 224))


def bit_train(resize: int, crop: int) -> Transform:
    """BiT fine-tuning: resize to a square, random crop and flip; values in -1..1."""
    half = (0.5, 0.5, 0.5)
    return Transform("random_crop", crop, resize=resize, flip=True, mean=half, std=half)


def bit_eval(crop: int) -> Transform:
    """BiT evaluation: the whole image resized to the crop size; values in -1..1."""
    half = (0.5, 0.5, 0.5)
    return Transform("resize", crop, mean=half, std=half)


def xray_train(size: int = 224, translate: float = 0.15) -> Transform:
    """Chest X-rays, training: centre square, rotation, scale, translation, flip; values in -1..1."""
    return replace(xray_eval(size), flip=True, affine=Affine(translate=translate))


def xray_eval(size: int = 224) -> Transform:
    """Chest X-rays, evaluation: centre square; values in -1..1."""
    half = (0.5, 0.5, 0.5)
    return Transform("xray", size, mean=half, std=half)


def windows(transform: Transform, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The part of each image that becomes the output: (b, 4) float64 top, left, height, width in pixels.

    sizes (b, 2) height, width as displayed; draws (b, DRAWS). Whole pixels for `random_resized_crop`, `resize` and
    `xray`; fractions where the crop comes after a resize. Inside the image always.
    """
    height, width = np.asarray(sizes, dtype=np.float64).T
    if transform.kind == "random_resized_crop":
        return _random_resized(transform, height, width, draws)
    if transform.kind == "random_crop":
        spare = transform.before_crop - transform.size
        at = np.floor(draws[:, _POSITION : _POSITION + 2] * (spare + 1)) / transform.before_crop
        part = transform.size / transform.before_crop
        return np.stack([at[:, 0] * height, at[:, 1] * width, part * height, part * width], axis=1)
    if transform.kind in ("center_crop", "random_short_crop"):
        short = np.minimum(height, width)
        rows = np.floor(transform.before_crop * height / short)  # the resized image, as torchvision rounds it
        columns = np.floor(transform.before_crop * width / short)
        spare_rows, spare_columns = rows - transform.size, columns - transform.size
        if transform.kind == "center_crop":
            top, left = np.rint(spare_rows / 2), np.rint(spare_columns / 2)
        else:
            top = np.floor(draws[:, _POSITION] * (spare_rows + 1))
            left = np.floor(draws[:, _POSITION + 1] * (spare_columns + 1))
        down, right = height / rows, width / columns
        return np.stack([top * down, left * right, transform.size * down, transform.size * right], axis=1)
    if transform.kind == "xray":
        side = np.minimum(height, width)
        return np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=1)
    return np.stack([np.zeros_like(height), np.zeros_like(width), height, width], axis=1)


def _random_resized(transform: Transform, height: np.ndarray, width: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """torchvision.transforms.RandomResizedCrop.get_params: ten attempts, then the largest centre crop."""
    lo, hi = transform.ratio
    area = (height * width)[:, None] * (
        transform.scale[0] + draws[:, 0 : 2 * _ATTEMPTS : 2] * (transform.scale[1] - transform.scale[0])
    )
    aspect = np.exp(np.log(lo) + draws[:, 1 : 2 * _ATTEMPTS : 2] * (np.log(hi) - np.log(lo)))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = fits.argmax(1)[:, None]
    found = fits.any(1)
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    top = np.floor(draws[:, _POSITION] * (height - h + 1))
    left = np.floor(draws[:, _POSITION + 1] * (width - w + 1))
    own = width / height
    fallback_w = np.where(own > hi, np.minimum(np.rint(height * hi), width), width)
    fallback_h = np.where(own < lo, np.minimum(np.rint(width / lo), height), height)
    w, h = np.where(found, w, fallback_w), np.where(found, h, fallback_h)
    top = np.where(found, top, (height - h) // 2)
    left = np.where(found, left, (width - w) // 2)
    return np.stack([top, left, h, w], axis=1)


def regions(transform: Transform, window: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The pixels to decode for each window: (b, 4) int32 top, left, height, width.

    Where the crop comes after a resize, the filter reads a little beyond the window: its reach is added.
    """
    lo, hi = np.floor(window[:, :2]), np.ceil(window[:, :2] + window[:, 2:])
    if transform.kind in ("random_crop", "random_short_crop", "center_crop"):
        reach = np.ceil(np.maximum(window[:, 2:] / transform.size, 1)) + 1
        lo, hi = np.maximum(lo - reach, 0), hi + reach
    hi = np.minimum(hi, sizes)
    return np.concatenate([lo, hi - lo], axis=1).astype(np.int32)


def flips(transform: Transform, draws: np.ndarray) -> np.ndarray:
    """Which samples are mirrored: (b,) bool."""
    return (draws[:, _FLIP] < 0.5) if transform.flip else np.zeros(len(draws), dtype=bool)


def matrices(transform: Transform, draws: np.ndarray) -> np.ndarray:
    """Where each output pixel (x, y) comes from, after the flip: (b, 2, 3) float32, pixel centres at n + 0.5.

    The inverse of torchvision's RandomAffine: rotate and scale about the centre, then translate.
    """
    ranges = transform.affine or Affine(0.0, (1.0, 1.0), 0.0)
    angle = np.deg2rad((2 * draws[:, _ROTATION] - 1) * ranges.rotation)
    scale = ranges.scale[0] + draws[:, _SCALE] * (ranges.scale[1] - ranges.scale[0])
    shift = (2 * draws[:, _SHIFT : _SHIFT + 2] - 1) * ranges.translate * transform.size
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    linear = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], axis=1)
    centre = np.full((len(draws), 2), transform.size / 2)
    offset = centre - np.einsum("bij,bj->bi", linear, centre + shift)
    return np.concatenate([linear, offset[:, :, None]], axis=2).astype(np.float32)


def randaugment_choices(transform: Transform, draws: np.ndarray) -> np.ndarray:
    """Operation number in RANDAUGMENT_OPS and sign (0 plus, 1 minus): (b, N, 2) int32."""
    operations = transform.randaugment[0] if transform.randaugment else 0
    u = draws[:, _RANDAUGMENT : _RANDAUGMENT + 2 * operations].reshape(len(draws), operations, 2)
    return np.floor(u * (len(RANDAUGMENT_OPS), 2)).astype(np.int32)
