"""The pipeline without DALI: Pillow in threads (it releases the interpreter lock), bounded prefetch."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps

from loaders.packs.shard import Pack
from loaders.pipelines.randaugment import apply_randaugment, warp
from loaders.pipelines.request import Request
from loaders.pipelines.transform import Transform


class HostPipeline:
    """Makes the images of one request after the other; same interface as DaliPipeline."""

    def __init__(
        self,
        pack: Pack,
        transform: Transform,
        requests: Iterator[Request],
        batch: int,
        *,
        device: torch.device,
        threads: int,
        prefetch: int,
    ) -> None:
        self._pack, self._transform, self._requests = pack, transform, requests
        self._device, self._prefetch = device, prefetch
        self._scale = (1 / (255 * np.array(transform.std))).astype(np.float32)
        self._shift = (-np.array(transform.mean) / np.array(transform.std)).astype(np.float32)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._queue: deque[tuple[torch.Tensor, list[Future]]] = deque()

    def _submit(self) -> bool:
        request = next(self._requests, None)
        if request is None:
            return False
        b, side = len(request.ids), self._transform.size
        images = torch.empty((b, side, side, 3), pin_memory=self._device.type == "cuda")
        out = images.numpy()
        bounds = np.linspace(0, b, min(b, 4 * self._threads) + 1).astype(int).tolist()
        jobs = [self._pool.submit(self._fill, request, out, lo, hi) for lo, hi in zip(bounds, bounds[1:], strict=False)]
        self._queue.append((images, jobs))
        return True

    def _fill(self, request: Request, out: np.ndarray, lo: int, hi: int) -> None:
        for i in range(lo, hi):
            record = int(request.ids[i])
            try:
                pixels = self._image(request, i, self._pack.record(record))
            except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
                raise RuntimeError(f"record {record} ({self._pack.keys[record]}): {error}") from error
            np.multiply(pixels, self._scale, out=out[i])
            out[i] += self._shift

    def _image(self, request: Request, i: int, data: np.ndarray) -> np.ndarray:
        top, left, height, width = request.regions[i].tolist()
        y0, x0, y1, x1 = request.rois[i].tolist()
        side = self._transform.size
        with Image.open(BytesIO(data.data)) as opened:
            image = _displayed(opened, self._transform)
        image = image.crop((left, top, left + width, top + height))
        box = (x0, y0, min(x1, width), min(y1, height))
        image = image.resize((side, side), Image.Resampling.BILINEAR, box=box)
        if request.flips[i]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._transform.randaugment is not None:
            image = apply_randaugment(image, request.choices[i], self._transform.randaugment[1])
        if self._transform.affine is not None:
            image = warp(image, request.matrices[i].ravel().tolist(), 0)
        return np.asarray(image) if image.mode == "RGB" else np.asarray(image)[:, :, None]

    def next_images(self) -> torch.Tensor:
        """(b, 3, S, S) float32, channels-last, on the device. StopIteration at the end."""
        while len(self._queue) <= self._prefetch and self._submit():
            pass
        if not self._queue:
            raise StopIteration
        images, jobs = self._queue.popleft()
        for job in jobs:
            job.result()
        return images.to(self._device, non_blocking=True).permute(0, 3, 1, 2)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()


def _displayed(opened: Image.Image, transform: Transform) -> Image.Image:
    """RGB or gray; gray of 16 bits as float32 in 0..255, unless the operations that follow are defined on bytes."""
    image, mode = ImageOps.exif_transpose(opened), "L" if transform.gray else "RGB"
    if not image.mode.startswith("I"):
        return image.convert(mode)
    gray = np.asarray(image) / np.float32(257)
    if transform.randaugment is None:
        return Image.fromarray(gray)
    return Image.fromarray(np.rint(gray).astype(np.uint8)).convert(mode)
