"""The last steps of an image on a CPU: resize, mirror, normalize, in threads.

torch's antialiased resizing of bytes is vectorized, and on the processors we measured takes a fifth of the time of
DALI's, which costs as much there as decoding does. Its result is the same within a level or two of 255.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from loaders.pipelines.transform import Transform


class Finisher:
    """Turns decoded images of any size into a batch.

    keep: batches whose memory is kept for later ones; white: the largest value of a pixel.
    """

    def __init__(self, transform: Transform, threads: int, keep: int, white: float = 255):
        size, mean, std = transform.size, np.array(transform.mean), np.array(transform.std)
        self._size, self._threads = size, threads
        # One value per float of a row: long inner loops.
        self._scale = np.tile(1 / (white * std), size).astype(np.float32)
        self._shift = np.tile(-mean / std, size).astype(np.float32)
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
        shape = (len(images), self._size, self._size, 3)
        base, out = self._buffers.take(shape)
        rows = base.reshape(len(images), self._size, -1)
        bounds = np.linspace(0, len(images), min(len(images), 4 * self._threads) + 1).astype(int).tolist()
        pieces = zip(bounds, bounds[1:], strict=False)
        return Batch(out, [self._pool.submit(self._finish, images, flips, rows, lo, hi) for lo, hi in pieces])

    def _finish(self, images: Sequence[np.ndarray], flips: np.ndarray, rows: np.ndarray, lo: int, hi: int) -> None:
        for i in range(lo, hi):
            decoded = images[i] if images[i].dtype == np.uint8 else images[i].astype(np.float32)
            image = torch.from_numpy(decoded).permute(2, 0, 1)[None]  # channels-last as it is
            image = torch.nn.functional.interpolate(image, (self._size, self._size), mode="bilinear", antialias=True)
            image = image[0].permute(1, 2, 0).expand(-1, -1, 3)
            image = image.flip(1) if flips[i] else image
            pixels = image.contiguous().numpy().reshape(self._size, -1)
            np.multiply(pixels, self._scale, out=rows[i])
            rows[i] += self._shift

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


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
        """(b, S, S, 3) float32, when all are done."""
        for job in self._jobs:
            job.result()
        return self._images
