"""The DALI pipeline, on the CPU or the GPU, fed with views of the pack's memory map. Only this module knows DALI."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from loaders.packs.shard import Pack
from loaders.pipelines.finish import Finisher, resize_by_area
from loaders.pipelines.reading import Reading
from loaders.pipelines.request import Request
from loaders.pipelines.transform import FILL, MAX_TRANSLATE, RANDAUGMENT_OPS, Transform
from loaders.pipelines.upload import Upload

_HW_DECODER_LOAD = 0.75  # share of JPEGs for the GPU's decoder unit; the rest goes to CUDA kernels and threads
_PREALLOCATE = 2048  # pixels a side: decoder buffers of this size are made at the start, not during training
# What a graph makes: images of the windows, for a Finisher; a batch of resized and augmented ones, of pixels as they
# are or normalized.
_DECODED, _BYTES, _NORMALIZED = "decoded", "bytes", "normalized"


class DaliPipeline:
    """Makes the images of one request after the other; same interface as HostPipeline."""

    def __init__(
        self,
        pack: Pack,
        transform: Transform,
        requests: Iterator[Request],
        batch: int,
        how: Reading,
    ) -> None:
        self._pack, self._transform, self._requests = pack, transform, requests
        self._device = torch.device(how.device)
        self._alive: deque = deque(maxlen=how.prefetch + 3)  # DALI reads the fed arrays in place
        self._gpu, self._mixed = how.decode != "cpu", how.decode == "mixed"
        # The operations of RandAugment are defined on bytes.
        deep = pack.bits > 8 and transform.randaugment is None
        white = 65535 if deep else 255
        travels = not self._gpu and self._device.type != "cpu"
        self._upload = Upload(transform, white, deep, self._device) if travels else None
        suits = not self._gpu and Finisher.suits(transform)
        self._finisher = Finisher(transform, how.threads, how.prefetch + 2, white, self._upload) if suits else None
        self._fed_flips: deque = deque()
        self._ready: deque[tuple | Exception] = deque()
        self._ahead = how.prefetch
        self._pipeline = _graph(
            self._feed,
            transform,
            how.decode,
            how.region,
            deep,
            _DECODED if self._finisher else _BYTES if self._upload else _NORMALIZED,
            batch_size=batch,
            num_threads=how.threads,
            device_id=(self._device.index or 0) if self._gpu else None,
            prefetch_queue_depth=how.prefetch,
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
            fed.append(
                _homogeneous(request.matrices) if self._transform.affine.outside == "reflect" else request.matrices
            )
        if self._transform.randaugment is not None:
            fed.append(request.choices)
        if self._mixed:
            fed.append(np.arange(len(request.ids)) % 2 == 0)
        self._alive.append(fed)
        return tuple(fed)

    def next_images(self) -> torch.Tensor:
        """(b, 3, S, S) float32, channels-last, on the device. StopIteration at the end."""
        if self._finisher is not None:
            images = self._next_finished(self._finisher)
        else:
            (made,) = self._pipeline.run(*([torch.cuda.current_stream(self._device)] if self._gpu else []))
            images = torch.utils.dlpack.from_dlpack(made.as_tensor())
        return images.permute(0, 3, 1, 2) if self._upload is None else self._upload.images(images)

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
def _graph(source: Callable[[], tuple], transform: Transform, decode: str, region: str, deep: bool, result: str) -> Any:
    """`deep`: decode to 16 bits, to which DALI scales images of 8, and go on in float32 instead of bytes.

    result: one of those above.
    """
    decode_only = result == _DECODED
    inputs = [(types.UINT8, 1), *[(types.INT32, 1)] * 2]
    inputs += [] if decode_only else [*[(types.FLOAT, 1)] * 2, (types.INT32, 0)]
    inputs += [(types.FLOAT, 2)] if transform.affine is not None else []
    inputs += [(types.INT32, 2)] if transform.randaugment is not None else []
    inputs += [(types.BOOL, 0)] if decode == "mixed" else []
    dtypes, dimensions = [dtype for dtype, _ in inputs], [dimension for _, dimension in inputs]
    data, anchor, shape, *rest = fn.external_source(
        source=source, num_outputs=len(inputs), batch=True, no_copy=True, dtype=dtypes, ndim=dimensions
    )
    where = (data, anchor, shape, transform)
    if decode == "mixed":
        if rest[-1]:  # noqa: SIM108  DALI makes a branch of the statement
            images = _decode(*where, "mixed", region, deep)
        else:
            images = _decode(*where, "cpu", region, deep).gpu()
    else:
        images = _decode(*where, "mixed" if decode == "gpu" else "cpu", region, deep)
    if decode_only:
        return images
    start, end, mirror, *extra = rest
    size = (transform.size, transform.size)
    if transform.downscale == "area":
        images = _by_area(images, start, end, transform.size, decode != "cpu", deep)
    else:
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
        choices = extra[1 if transform.affine is not None else 0]
        images = _randaugment(images, choices, *transform.randaugment, size)
    if transform.affine is not None and transform.affine.outside == "reflect":
        images = fn.experimental.warp_perspective(
            images, matrix=extra[0], border_mode="reflect_101", interp_type=types.INTERP_LINEAR, inverse_map=True
        )
    elif transform.affine is not None:
        images = fn.warp_affine(
            images, matrix=extra[0], fill_value=0, interp_type=types.INTERP_LINEAR, inverse_map=True
        )
    if result == _BYTES:
        return fn.flip(images, horizontal=mirror)
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


def _decode(data: Any, anchor: Any, shape: Any, transform: Transform, device: str, region: str, deep: bool) -> Any:
    """The pixels of the region at `anchor` of `shape`, on the CPU; `mixed`: on the GPU.

    Units for JPEGs decode whole images anyway, and decoding regions on a GPU fails in nvImageCodec 0.9
    (NVIDIA/nvImageCodec#55). The region is cut, not handed to the resizing as its window: that reads beyond the
    window's edge, where decoding the region alone repeats the edge, and edges would differ by tens of levels.
    """
    how: dict[str, Any] = {
        "device": device,
        "output_type": types.GRAY if transform.gray else types.RGB,
        "dtype": types.UINT16 if deep else types.UINT8,
    }
    if device == "mixed":
        how |= {
            "hw_decoder_load": _HW_DECODER_LOAD,
            "preallocate_width_hint": _PREALLOCATE,
            "preallocate_height_hint": _PREALLOCATE,
        }
    if region == "slice" or (region == "auto" and device == "cpu"):
        return fn.decoders.image_slice(data, start=anchor, shape=shape, axis_names="HW", **how)
    return fn.slice(fn.decoders.image(data, **how), start=anchor, shape=shape, axis_names="HW")


def _by_area(images: Any, start: Any, end: Any, size: int, gpu: bool, deep: bool) -> Any:
    """DALI has no such filter: one image after the other goes through torch, on the device it is on."""

    def resized(*capsules: Any) -> Any:
        image, start, end = map(torch.utils.dlpack.from_dlpack, capsules)
        height, width, _ = image.shape
        (y0, x0), (y1, x1) = start.tolist(), end.tolist()
        image = image.float() if deep else image
        small = resize_by_area(image, (y0, x0, min(y1, height), min(x1, width)), size).contiguous()
        if gpu:
            torch.cuda.current_stream(small.device).synchronize()  # DALI reads it on a stream of its own
        return small.__dlpack__()

    inputs = [images, start.gpu(), end.gpu()] if gpu else [images, start, end]
    device = "gpu" if gpu else "cpu"
    return fn.dl_tensor_python_function(
        *inputs, function=resized, batch_processing=False, device=device, output_layouts="HWC"
    )


def _homogeneous(matrices: np.ndarray) -> np.ndarray:
    """(b, 2, 3) → (b, 3, 3) float32."""
    last = np.broadcast_to(np.array([[0, 0, 1]], np.float32), (len(matrices), 1, 3))
    return np.concatenate([matrices, last], axis=1)


def _randaugment(images: Any, choices: Any, operations: int, magnitude: int, size: tuple[int, int]) -> Any:
    from nvidia.dali.auto_aug.core import select, signed_bin  # modules that most recipes do not need
    from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite

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
