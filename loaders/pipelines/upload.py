"""Batches that were decoded on the CPU, on their way to a GPU: bytes travel, and become floats there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loaders.pipelines.transform import Transform


class Upload:
    """Takes pixels to `device` on a stream of its own, beside what runs there, and normalizes them.

    white: the largest value of a pixel. deep: pixels are float32, since they have more than 256 levels.
    """

    def __init__(self, transform: Transform, white: float, deep: bool, device: torch.device) -> None:
        self._shape = (transform.size, transform.size, 1 if transform.gray else 3)
        self._dtype = torch.float32 if deep else torch.uint8
        self._device = device
        scale, shift = transform.normalization(white)
        self._scale, self._shift = torch.from_numpy(scale).to(device), torch.from_numpy(shift).to(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def staging(self, b: int) -> torch.Tensor:
        """Memory on the host for `pixels`, (b, S, S, 3), gray (b, S, S, 1); page-locked where a GPU reads it.

        torch gives the same memory out again only when the copy from it has ended.
        """
        return torch.empty((b, *self._shape), dtype=self._dtype, pin_memory=self._stream is not None)

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """(b, 3, S, S) float32, channels-last, normalized, on the device; pixels as `staging` has them, up to white."""
        with self._aside():
            moved = to_device(pixels, self._device)
            images = (moved * self._scale).add_(self._shift)
        if self._stream is not None:
            images.record_stream(torch.cuda.current_stream(self._device))
        return images.permute(0, 3, 1, 2)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream for copies; what follows on the current stream waits for it, the host does not."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; the host does not wait for the copy to a GPU."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
