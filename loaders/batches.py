"""Batches for the trainer and for evaluation, from DALI where it is installed, else from the host pipeline.

Both pipelines deliver the same samples in the same order with the same windows, flips and augmentations.
"""

import importlib.util
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from loaders.errors import UserError
from loaders.order import DRAWS, EvalPlan, TrainPlan
from loaders.shard import Pack
from loaders.transform import Transform, flips, matrices, randaugment_choices, regions, windows

BACKENDS = ("auto", "dali", "host")


class Batch(NamedTuple):
    """What the network is given."""

    images: torch.Tensor  # (b, 3, S, S) float32, channels-last memory, normalized
    labels: torch.Tensor  # (b,) int64 class numbers, or (b, L) float32 with NaN for unknown
    ids: torch.Tensor  # (b,) int64 record numbers in the pack
    valid: torch.Tensor  # (b,) bool, False for the padding of the last evaluation batch


class Request(NamedTuple):
    """What a pipeline needs to make one batch; arrays of b rows."""

    ids: np.ndarray  # (b,) int64
    valid: np.ndarray  # (b,) bool
    regions: np.ndarray  # (b, 4) int32 top, left, height, width of the pixels to decode
    rois: np.ndarray  # (b, 4) float32 top, left, bottom, right of the window within the region
    flips: np.ndarray  # (b,) int32, 1 to mirror
    matrices: np.ndarray  # (b, 2, 3) float32 of the affine step
    choices: np.ndarray  # (b, N, 2) int32 of RandAugment


def request(pack: Pack, transform: Transform, ids: np.ndarray, draws: np.ndarray, valid=None) -> Request:
    """Everything about a batch that can be computed before its images are read."""
    sizes = pack.sizes[ids]
    window = windows(transform, sizes, draws)
    region = regions(transform, window, sizes)
    start = window[:, :2] - region[:, :2]
    return Request(
        ids=ids,
        valid=np.ones(len(ids), dtype=bool) if valid is None else valid,
        regions=region,
        rois=np.concatenate([start, start + window[:, 2:]], axis=1).astype(np.float32),
        flips=flips(transform, draws).astype(np.int32),
        matrices=matrices(transform, draws),
        choices=randaugment_choices(transform, draws),
    )


def choose_backend(backend: str) -> str:
    """`dali` or `host`. UserError when DALI is asked for and is not installed."""
    if backend not in BACKENDS:
        raise UserError(f"unknown input backend {backend!r}; there are {', '.join(BACKENDS)}")
    present = importlib.util.find_spec("nvidia.dali") is not None if _has_nvidia() else False
    if backend == "dali" and not present:
        raise UserError(
            "the DALI pipeline was asked for, but DALI is not installed; install it with"
            " `pip install nvidia-dali-cuda130` (or the build for your CUDA), or take backend 'host'"
        )
    return "dali" if present and backend != "host" else "host"


def _has_nvidia() -> bool:
    return importlib.util.find_spec("nvidia") is not None


class _Batches:
    """Iterates over a pipeline; `backend` says which one runs, `close` frees its threads and buffers."""

    def __init__(
        self,
        pack: Pack,
        transform: Transform,
        requests: Iterable[Request],
        batch: int,
        group: int,
        *,
        backend: str,
        device: str | torch.device,
        threads: int,
        prefetch: int,
    ):
        if threads < 1 or prefetch < 1:
            raise UserError(f"{threads} threads and {prefetch} batches of prefetch: both must be 1 or more")
        self.backend = choose_backend(backend)
        if self.backend == "dali":
            from loaders.dali import DaliPipeline as Pipeline  # DALI takes a second to import: only when used
        else:
            from loaders.host import HostPipeline as Pipeline
        self._pack, self._group, self._device = pack, group, torch.device(device)
        self._pending: deque[Request] = deque()
        self._pipeline = Pipeline(
            pack,
            transform,
            self._noted(requests),
            batch,
            device=self._device,
            threads=threads,
            prefetch=prefetch,
        )

    def _noted(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Pass the requests on, remembering what is in flight."""
        for one in requests:
            self._pending.append(one)
            yield one

    def _next(self) -> Batch:
        if self._pipeline is None:
            raise StopIteration
        try:
            images = self._pipeline.next_images()
        except StopIteration:
            self.close()
            raise
        except RuntimeError as error:
            raise RuntimeError(self._explain(error)) from error
        done = self._pending.popleft()
        labels = torch.from_numpy(np.ascontiguousarray(self._pack.labels[done.ids]))
        extra = (labels, torch.from_numpy(done.ids), torch.from_numpy(done.valid))
        if self._device.type == "cuda":
            extra = [t.pin_memory().to(self._device, non_blocking=True) for t in extra]
        return Batch(images, *extra)

    def _explain(self, error: RuntimeError) -> str:
        ids = self._pending[0].ids if self._pending else np.array([], dtype=np.int64)
        damaged = self._pack.damaged(ids)
        where = f"records {ids.tolist()}" if not damaged else "damaged " + ", ".join(damaged)
        return f"{self._pack.path}: a batch could not be made of {where}: {error}"

    def __iter__(self):
        return self

    def __next__(self):
        return [self._next() for _ in range(self._group)] if self._group else self._next()

    def close(self) -> None:
        """Stop; safe to call twice."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def train_batches(
    pack: Pack,
    plan: TrainPlan,
    transform: Transform,
    *,
    first_step: int = 0,
    last_step: int | None = None,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    threads: int = 1,
    prefetch: int = 2,
) -> _Batches:
    """An iterator over steps [first_step, last_step): each a list of one Batch per micro-batch.

    Endless without `last_step`. `backend`: auto (DALI where installed), dali, host. `device`: where the tensors
    come out; with cuda, DALI decodes there. `threads` decode; `prefetch` batches are made ahead. The iterator has
    `.backend` and `.close()`.
    """

    def requests() -> Iterator[Request]:
        step = first_step
        while last_step is None or step < last_step:
            for part in plan.step(step):
                yield request(pack, transform, part.ids, part.draws)
            step += 1

    return _Batches(pack, transform, requests(), plan.micro_batch, plan.accumulate, backend=backend, device=device,
                    threads=threads, prefetch=prefetch)  # fmt: skip


def eval_batches(
    pack: Pack,
    plan: EvalPlan,
    transform: Transform,
    *,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    threads: int = 1,
    prefetch: int = 2,
) -> _Batches:
    """An iterator over the plan's batches (`len(plan)` of them); arguments as `train_batches`.

    A random transform is drawn at the middle of its ranges; evaluation transforms draw nothing.
    """

    def requests() -> Iterator[Request]:
        draws = np.full((plan.batch, DRAWS), 0.5)
        for number in range(len(plan)):
            ids, valid = plan.batch_ids(number)
            yield request(pack, transform, ids, draws, valid)

    return _Batches(pack, transform, requests(), plan.batch, 0, backend=backend, device=device, threads=threads,
                    prefetch=prefetch)  # fmt: skip
