"""The last steps of an image on a CPU: resize, mirror, normalize, in threads; and resizing by area.

torch's antialiased resizing of bytes is vectorized, and on the processors we measured takes a fifth of the time of
DALI's, which costs as much there as decoding does. Its result is the same within a level or two of 255.
"""

import math
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from loaders.pipelines.transform import Transform
from loaders.pipelines.upload import Upload


class Finisher:
    """Turns decoded images of any size into a batch.

    keep: batches whose memory is kept for later ones; white: the largest value of a pixel. upload: pixels go into its
    memory as they are, to be normalized on a device.
    """

    def __init__(self, transform: Transform, threads: int, keep: int, white: float = 255, upload: Upload | None = None):
        self._size, self._threads, self._upload = transform.size, threads, upload
        self._by_area = transform.downscale == "area"
        # One value per float of a row: long inner loops.
        self._scale, self._shift = (np.tile(values, self._size) for values in transform.normalization(white))
        self._buffers = _Buffers(keep)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="finish")

    @staticmethod
    def suits(transform: Transform) -> bool:
        """Whether the window is of whole pixels, and nothing but mirroring comes between resizing and normalizing."""
        whole = transform.kind in ("random_resized_crop", "resize", "xray")
        return whole and transform.affine is None and transform.randaugment is None

    def submit(self, images: Sequence[np.ndarray], flips: np.ndarray) -> "Batch":
        """Start on images, each (h, w, 3) or gray (h, w, 1), uint8, or uint16 up to `white`; flips (b,) int32.

        A flip of 1 mirrors.
        """
        base, out = self._memory(len(images))
        bounds = np.linspace(0, len(images), min(len(images), 4 * self._threads) + 1).astype(int).tolist()
        pieces = zip(bounds, bounds[1:], strict=False)
        return Batch(out, [self._pool.submit(self._finish, images, flips, base, lo, hi) for lo, hi in pieces])

    def _memory(self, b: int) -> tuple[np.ndarray, torch.Tensor]:
        """An array for the threads, and a tensor of the same memory."""
        if self._upload is None:
            return self._buffers.take((b, self._size, self._size, 3))
        out = self._upload.staging(b)
        return out.numpy(), out

    def _finish(self, images: Sequence[np.ndarray], flips: np.ndarray, base: np.ndarray, lo: int, hi: int) -> None:
        for i in range(lo, hi):
            decoded = images[i] if images[i].dtype == np.uint8 else images[i].astype(np.float32)
            height, width, _ = decoded.shape
            if self._by_area:
                image = resize_by_area(torch.from_numpy(decoded), (0, 0, height, width), self._size)
            else:
                image = _bilinear(torch.from_numpy(decoded), self._size)
            image = image.flip(1) if flips[i] else image
            if self._upload is not None:
                base[i] = image.numpy()
                continue
            pixels = image.expand(-1, -1, 3).contiguous().numpy().reshape(self._size, -1)
            row = base[i].reshape(self._size, -1)
            np.multiply(pixels, self._scale, out=row)
            row += self._shift

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def resize_by_area(image: torch.Tensor, box: tuple[float, float, float, float], size: int) -> torch.Tensor:
    """The window `box` (top, left, bottom, right, in pixels) of an image (h, w, c), uint8 or float32: (size, size, c).

    Each output pixel is the mean over its share of the window, parts of pixels counted as such, as OpenCV's INTER_AREA
    has it; bytes are rounded. Where a side of the window is smaller than `size`, the pixels that it touches are
    enlarged bilinearly, as there.
    """
    top, left, bottom, right = box
    if min(bottom - top, right - left) < size:
        rows, columns = (slice(int(lo), math.ceil(hi)) for lo, hi in ((top, bottom), (left, right)))
        return _bilinear(image[rows, columns], size)
    found = image.double()
    for axis, (start, end) in enumerate(((top, bottom), (left, right))):
        edges = torch.linspace(start, end, size + 1, dtype=torch.float64, device=image.device)
        whole = edges.long().clamp(max=found.shape[axis] - 1)
        part = (edges - whole).reshape(-1, *[1] * (2 - axis))
        # The sum up to each edge: of the pixels before it, and of the part of the one that it cuts.
        before = found.cumsum(axis).index_select(axis, whole) - (1 - part) * found.index_select(axis, whole)
        found = before.diff(dim=axis) * (size / (end - start))
    return found.round().to(image.dtype) if image.dtype == torch.uint8 else found.to(image.dtype)


def _bilinear(image: torch.Tensor, size: int) -> torch.Tensor:
    """(h, w, c) → (size, size, c), with antialiasing; the dtype stays."""
    batch = image.permute(2, 0, 1)[None]  # channels-last as it is
    resized = torch.nn.functional.interpolate(batch, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0)


class _Buffers:
    """Memory of batches that nobody holds any more. Getting new memory from the system for each costs more than
    normalizing it."""

    def __init__(self, keep: int):
        self._free: deque[np.ndarray] = deque(maxlen=keep)

    def take(self, shape: tuple[int, ...]) -> tuple[np.ndarray, torch.Tensor]:
        """An array and a tensor of the same memory, which comes back when the tensor and its views are gone."""
        base = self._free.pop() if self._free else np.empty(shape, np.float32)
        if base.shape != shape:
            base = np.empty(shape, np.float32)
        held = base[:]  # the tensor's storage keeps this view alive, and nothing else does
        weakref.finalize(held, self._free.append, base)
        return base, torch.from_numpy(held)


class Batch:
    """Images that threads are working on."""

    def __init__(self, images: torch.Tensor, jobs: list[Future]):
        self._images, self._jobs = images, jobs

    def result(self) -> torch.Tensor:
        """(b, S, S, 3) float32, or what `upload` takes, when all are done."""
        for job in self._jobs:
            job.result()
        return self._images
