"""From stored values to gray or RGB: modality LUT or rescale, VOI LUT or window, inverted last. DICOM PS3.3, C.11.1 and
C.11.2; PS3.3, C.7.6.16.2.9 and .10 for enhanced images."""

from collections.abc import Callable, MutableSequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loaders.sources.kinds.dicom.reading import Tags, Unusable, library, usable

Window = str | tuple[float, float]
"""file: what the file says, else all that can be stored; full: the latter; extremes: from the image's least to its
greatest value; or centre and width."""
_WHITE = 65535
_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


@dataclass(frozen=True)
class _Lut:
    """A look-up table."""

    first: int
    data: np.ndarray
    bits: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        at = np.rint(values).astype(np.int64) - self.first
        return self.data[np.clip(at, 0, len(self.data) - 1)].astype(np.float64)


def shown(stored: np.ndarray, tags: Tags, kind: str, index: int, window: Window = "file") -> np.ndarray:
    """The picture that a viewer shows of frame `index`: gray (height, width), uint8 where nothing has more than 8 bits,
    else uint16 with white 65535; colour (height, width, 3), uint8.

    `stored`, `tags`, `kind`: as `frame` of `frames.py` returns them. Unusable with the reason.
    """
    with usable("what its header says of its values cannot be read"):
        if kind == "PALETTE COLOR":
            colours = library().pixels.apply_color_lut(stored, tags)[..., :3]
            return _in_bytes(colours, 8 * colours.dtype.itemsize)
        if kind == "RGB":
            return _in_bytes(stored, int(tags.BitsStored))
        if not kind.startswith("MONOCHROME"):
            raise Unusable(f"its pixels are {kind}, which is not turned into gray or RGB here")
        return _gray(stored, tags, kind == "MONOCHROME1", index, window)


def _in_bytes(colours: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return colours.astype(np.uint8)
    return np.rint(colours * (255 / (2**bits - 1))).clip(0, 255).astype(np.uint8)


def _gray(stored: np.ndarray, tags: Tags, inverted: bool, index: int, window: Window) -> np.ndarray:
    modality = _places(tags, index, "PixelValueTransformationSequence")
    interest = _places(tags, index, "FrameVOILUTSequence")
    little = bool(getattr(tags, "original_encoding", (None, True))[1])
    lut, voi = _lut(modality, "ModalityLUTSequence", little), _lut(interest, "VOILUTSequence", little)
    slope, intercept = _number(modality, "RescaleSlope", 1.0), _number(modality, "RescaleIntercept", 0.0)
    if not lut and not slope:
        raise Unusable("its rescale slope is 0")
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    many = stored.dtype.kind == "f" or stored.dtype.itemsize > 2
    bits = 64 if stored.dtype.kind == "f" else int(tags.BitsStored)
    # Few values are possible, so each is worked out once.
    code = stored if many else stored.view(f"u{stored.dtype.itemsize}")
    every = stored if many else np.arange(256**stored.dtype.itemsize, dtype=code.dtype).view(stored.dtype)
    values = lut(every) if lut else every.astype(np.float64) * slope + intercept
    if not np.isfinite(values).all():
        raise Unusable("its pixels are not all numbers")

    def of_interest() -> tuple[float, float]:
        if window == "extremes":
            there = values if many else values[np.bincount(code.ravel(), minlength=len(every)) > 0]
            return float(there.min()), float(there.max())
        if lut:
            return 0.0, 2.0**lut.bits - 1
        if many and bits > 16:
            raise Unusable(f"its values have {bits} bits, and no window; --set window=CENTER,WIDTH or extremes")
        low = -(2.0 ** (bits - 1)) if stored.dtype.kind == "i" else 0.0
        ends = slope * low + intercept, slope * (low + 2.0**bits - 1) + intercept
        return min(ends), max(ends)

    light = _light(values, interest, voi, window, of_interest)
    deep = bits > 8 or bool(lut and lut.bits > 8) or bool(window == "file" and voi and voi.bits > 8)
    white = _WHITE if deep else 255
    levels = np.rint(light * white).clip(0, white).astype(np.uint16 if deep else np.uint8)
    levels = white - levels if inverted else levels
    return levels if many else levels[code]


def _light(
    values: np.ndarray, interest: Tags, voi: _Lut | None, window: Window, full: Callable[[], tuple[float, float]]
) -> np.ndarray:
    """From 0, black, to 1, white, before anything is inverted."""
    if window == "file" and voi:
        return voi(values) / (2.0**voi.bits - 1)
    function = "LINEAR"
    if window == "file":
        center, width = _number(interest, "WindowCenter"), _number(interest, "WindowWidth")
        function = str(interest.get("VOILUTFunction") or function).upper()
        if center is not None and width is not None:
            window = center, width
    if isinstance(window, str):
        low, high = full()
        return (values - low) / (high - low) if high > low else np.zeros_like(values)
    if function not in _FUNCTIONS:
        raise Unusable(f"its VOI LUT function is none of {', '.join(_FUNCTIONS)}; --set window=… gives a window")
    if window[1] < 1 if function == "LINEAR" else window[1] <= 0:
        raise Unusable(f"its window is {window[1]:g} wide, too little for {function}; --set window=… gives another")
    of = library().Dataset()
    of.PhotometricInterpretation, of.PixelRepresentation, of.BitsStored = "MONOCHROME2", 0, 16
    of.WindowCenter, of.WindowWidth, of.VOILUTFunction = *window, function
    return library().pixels.apply_windowing(values, of) / _WHITE


def _places(tags: Tags, index: int, sequence: str) -> Tags:
    """Where the header speaks of this frame: in its own functional group, in the one of all frames, else at large."""
    for groups, at in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        items = tags.get(groups) or []
        inner = items[at].get(sequence) if at < len(items) else None
        if inner:
            return inner[0]
    return tags


def _lut(place: Tags, name: str, little: bool) -> _Lut | None:
    """The first of a sequence of look-up tables; None where there is none, or an empty one."""
    sequence = place.get(name)
    descriptor, data = (sequence[0].get(part) for part in ("LUTDescriptor", "LUTData")) if sequence else (None, None)
    if not descriptor or data is None:
        return None
    entries, first, bits = (int(number) for number in descriptor)
    entries = entries or 1 << 16
    if isinstance(data, bytes):  # entries of 8 bits may stand two in a word
        width = 1 if bits <= 8 and len(data) < 2 * entries else 2
        table = np.frombuffer(data[: len(data) // width * width], f"{'<' if little else '>'}u{width}")
    else:
        table = np.atleast_1d(np.asarray(data, dtype=np.int64))
    if len(table) < entries or not 1 <= bits <= 16:
        raise Unusable(f"its look-up table has {len(table):,} of {entries:,} entries, of {bits} bits")
    return _Lut(first, table[:entries], bits)


def _number(place: Tags, name: str, default: Any = None) -> Any:
    """The first value of an element as a float; `default` where there is none."""
    value = place.get(name)
    if isinstance(value, MutableSequence):
        value = value[0] if value else None
    if value in (None, ""):
        return default
    if not np.isfinite(number := float(value)):
        raise Unusable(f"its {name} is no finite number")
    return number
