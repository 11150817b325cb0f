"""The DALI pipeline, on the CPU or the GPU, fed with views of the pack's memory map. Only this module knows DALI."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from nvidia.dali import fn, types
from nvidia.dali.auto_aug.core import select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.pipeline import pipeline_def

from loaders.packs.shard import Pack
from loaders.pipelines.finish import Finisher
from loaders.pipelines.randaugment import FILL, MAX_TRANSLATE
from loaders.pipelines.request import Request
from loaders.pipelines.transform import RANDAUGMENT_OPS, Transform

_HW_DECODER_LOAD = 0.75  # share of JPEGs for the GPU's decoder unit; the rest goes to CUDA kernels and threads
_PREALLOCATE = 2048  # pixels a side: decoder buffers of this size are made at the start, not during training


class DaliPipeline:
    """Makes the images of one request after the other; same interface as HostPipeline."""

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
        self._pack, self._transform, self._requests, self._device = pack, transform, requests, device
        self._alive: deque = deque(maxlen=prefetch + 3)  # DALI reads the fed arrays in place
        gpu = device.type == "cuda"
        # The operations of RandAugment are defined on bytes.
        deep = pack.bits > 8 and transform.randaugment is None
        white = 65535 if deep else 255
        suits = not gpu and Finisher.suits(transform)
        self._finisher = Finisher(transform, threads, prefetch + 2, white) if suits else None
        self._fed_flips: deque = deque()
        self._ready: deque[tuple | Exception] = deque()
        self._ahead = prefetch
        self._pipeline = _graph(
            self._feed,
            transform,
            gpu,
            self._finisher is not None,
            deep,
            batch_size=batch,
            num_threads=threads,
            device_id=(device.index or 0) if gpu else None,
            prefetch_queue_depth=prefetch,
            exec_dynamic=True,
        )
        self._pipeline.build()

    def _feed(self) -> tuple:
        request = next(self._requests)
        region, roi = request.regions, request.rois
        fed = [
            self._pack.records(request.ids),
            *(np.ascontiguousarray(a) for a in (region[:, :2], region[:, 2:])),
        ]
        if self._finisher is not None:
            self._fed_flips.append(request.flips)
        else:
            fed += [*(np.ascontiguousarray(a) for a in (roi[:, :2], roi[:, 2:])), request.flips]
        if self._transform.affine is not None:
            fed.append(request.matrices)
        if self._transform.randaugment is not None:
            fed.append(request.choices)
        self._alive.append(fed)
        return tuple(fed)

    def next_images(self) -> torch.Tensor:
        """(b, 3, S, S) float32, channels-last, on the device. StopIteration at the end."""
        if self._finisher is not None:
            return self._next_finished(self._finisher).permute(0, 3, 1, 2)
        if self._device.type == "cuda":
            (images,) = self._pipeline.run(torch.cuda.current_stream(self._device))
        else:
            (images,) = self._pipeline.run()
        return torch.utils.dlpack.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)

    def _next_finished(self, finisher: Finisher) -> torch.Tensor:
        """DALI decodes ahead in its threads, and the finisher's threads follow one batch behind."""
        while len(self._ready) < self._ahead and not (self._ready and isinstance(self._ready[-1], Exception)):
            try:
                (images,) = self._pipeline.run()
                decoded = [np.asarray(image) for image in images]
                # `images` goes along: it owns the pixels that the threads read.
                self._ready.append((finisher.submit(decoded, self._fed_flips.popleft()), images))
            except (StopIteration, RuntimeError) as error:
                self._ready.append(error)  # raised when its turn comes
        first = self._ready.popleft()
        if isinstance(first, Exception):
            raise first
        return first[0].result()

    def close(self) -> None:
        if self._finisher is not None:
            self._finisher.close()
        self._pipeline = None
        self._alive.clear()
        self._ready.clear()


@pipeline_def(enable_conditionals=True)
def _graph(source: Callable[[], tuple], transform: Transform, gpu: bool, decode_only: bool, deep: bool) -> Any:
    """`deep`: decode to 16 bits, to which DALI scales images of 8, and go on in float32 instead of bytes."""
    inputs = [(types.UINT8, 1), *[(types.INT32, 1)] * 2]
    inputs += [] if decode_only else [*[(types.FLOAT, 1)] * 2, (types.INT32, 0)]
    inputs += [(types.FLOAT, 2)] if transform.affine is not None else []
    inputs += [(types.INT32, 2)] if transform.randaugment is not None else []
    dtypes, dimensions = [dtype for dtype, _ in inputs], [dimension for _, dimension in inputs]
    data, anchor, shape, *rest = fn.external_source(
        source=source, num_outputs=len(inputs), batch=True, no_copy=True, dtype=dtypes, ndim=dimensions
    )
    hints: dict[str, Any] = {}
    if gpu:
        hints = {
            "hw_decoder_load": _HW_DECODER_LOAD,
            "preallocate_width_hint": _PREALLOCATE,
            "preallocate_height_hint": _PREALLOCATE,
        }
    device = "mixed" if gpu else "cpu"
    images = fn.decoders.image_slice(
        data,
        start=anchor,
        shape=shape,
        axis_names="HW",
        device=device,
        output_type=types.GRAY if transform.gray else types.RGB,
        dtype=types.UINT16 if deep else types.UINT8,
        **hints,
    )
    if decode_only:
        return images
    start, end, mirror, *extra = rest
    size = (transform.size, transform.size)
    images = fn.resize(
        images,
        size=size,
        roi_start=start,
        roi_end=end,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        dtype=types.FLOAT if deep else types.UINT8,
    )
    if transform.affine is not None or transform.randaugment is not None:
        images = fn.flip(images, horizontal=mirror)
        mirror = 0
    if transform.randaugment is not None:
        images = _randaugment(images, extra[-1], *transform.randaugment, size)
    if transform.affine is not None:
        images = fn.warp_affine(
            images, matrix=extra[0], fill_value=0, interp_type=types.INTERP_LINEAR, inverse_map=True
        )
    if transform.gray:
        images = fn.cat(images, images, images, axis_name="C")  # late: until here there was a third of the work
    white = 65535 if deep else 255
    return fn.crop_mirror_normalize(
        images,
        mirror=mirror,
        dtype=types.FLOAT,
        output_layout="HWC",
        mean=[white * m for m in transform.mean],
        std=[white * s for s in transform.std],
    )


def _randaugment(images: Any, choices: Any, operations: int, magnitude: int, size: tuple[int, int]) -> Any:
    suite = {a.name: a for a in get_rand_augment_suite(use_shape=True, max_translate_rel=MAX_TRANSLATE)}
    ordered = [suite[name] for name in RANDAUGMENT_OPS]
    for k in range(operations):
        images = select(
            ordered,
            choices[k, 0],
            data=images,
            magnitude_bin=signed_bin(magnitude, random_sign=choices[k, 1]),
            num_magnitude_bins=31,
            fill_value=FILL,
            interp_type=types.INTERP_LINEAR,
            shape=size,
        )
    return images
