"""The pipeline without DALI: Pillow in threads (it releases the interpreter lock), bounded prefetch."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps

from loaders.packs.shard import Pack
from loaders.pipelines.finish import resize_by_area
from loaders.pipelines.randaugment import apply_randaugment, warp, warp_reflected
from loaders.pipelines.reading import Reading
from loaders.pipelines.request import Request
from loaders.pipelines.transform import Transform
from loaders.pipelines.upload import Upload


class HostPipeline:
    """Makes the images of one request after the other; same interface as DaliPipeline."""

    def __init__(
        self,
        pack: Pack,
        transform: Transform,
        requests: Iterator[Request],
        batch: int,
        how: Reading,
    ) -> None:
        self._pack, self._transform, self._requests = pack, transform, requests
        self._prefetch = how.prefetch
        self._scale, self._shift = transform.normalization(255)
        device, deep = torch.device(how.device), pack.bits > 8 and transform.randaugment is None
        self._upload = None if device.type == "cpu" else Upload(transform, 255, deep, device)
        self._threads = how.threads
        self._pool = ThreadPoolExecutor(how.threads, thread_name_prefix="decode")
        self._queue: deque[tuple[torch.Tensor, list[Future]]] = deque()

    def _submit(self) -> bool:
        request = next(self._requests, None)
        if request is None:
            return False
        b, side = len(request.ids), self._transform.size
        images = torch.empty((b, side, side, 3)) if self._upload is None else self._upload.staging(b)
        out = images.numpy()
        bounds = np.linspace(0, b, min(b, 4 * self._threads) + 1).astype(int).tolist()
        jobs = [self._pool.submit(self._fill, request, out, lo, hi) for lo, hi in zip(bounds, bounds[1:], strict=False)]
        self._queue.append((images, jobs))
        return True

    def _fill(self, request: Request, out: np.ndarray, lo: int, hi: int) -> None:
        for i in range(lo, hi):
            record = int(request.ids[i])
            self._pack.check_files(request.ids[i : i + 1])  # it may have waited here for long
            try:
                pixels = self._image(request, i, self._pack.record(record))
            except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
                raise RuntimeError(f"record {record} ({self._pack.keys[record]}): {error}") from error
            if self._upload is not None:
                out[i] = pixels
                continue
            np.multiply(pixels, self._scale, out=out[i])
            out[i] += self._shift

    def _image(self, request: Request, i: int, data: np.ndarray) -> np.ndarray:
        top, left, height, width = request.regions[i].tolist()
        y0, x0, y1, x1 = request.rois[i].tolist()
        side = self._transform.size
        with Image.open(BytesIO(data.data)) as opened:
            image = _displayed(opened, self._transform)
        image = image.crop((left, top, left + width, top + height))
        y1, x1 = min(y1, height), min(x1, width)
        if self._transform.downscale == "area":
            pixels = torch.from_numpy(np.atleast_3d(np.array(image)))
            resized = resize_by_area(pixels, (y0, x0, y1, x1), side).numpy()
            image = Image.fromarray(resized if image.mode == "RGB" else resized[:, :, 0])
        else:
            image = image.resize((side, side), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
        if request.flips[i]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self._transform.randaugment is not None:
            image = apply_randaugment(image, request.choices[i], self._transform.randaugment[1])
        if self._transform.affine is not None:
            matrix = request.matrices[i].ravel().tolist()
            reflects = self._transform.affine.outside == "reflect"
            image = warp_reflected(image, matrix) if reflects else warp(image, matrix, 0)
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
        return images.permute(0, 3, 1, 2) if self._upload is None else self._upload.images(images)

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
