"""Batches for the trainer and for evaluation, from DALI where it is installed, else from the host pipeline.

Both pipelines deliver the same samples in the same order with the same windows, flips and augmentations.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch

from loaders.packs.shard import Pack
from loaders.pipelines.bad import UNSOUND, BadRecords, nothing_decodes, short
from loaders.pipelines.order import DRAWS, EvalPlan, TrainPlan
from loaders.pipelines.reading import Reading, chosen
from loaders.pipelines.request import Request, request
from loaders.pipelines.transform import Transform
from loaders.pipelines.upload import to_device

_ENOUGH = 16  # records that fail one after another, before it is the decoder that is at fault


class Batch(NamedTuple):
    """What the network is given."""

    images: torch.Tensor  # (b, 3, S, S) float32, channels-last memory, normalized
    labels: torch.Tensor  # (b,) int64 class numbers, or (b, L) float32 with NaN for unknown
    ids: torch.Tensor  # (b,) int64 record numbers in the pack
    valid: torch.Tensor  # (b,) bool, False for the padding of the last evaluation batch


class Pipeline(Protocol):
    """Makes the images of one request after the other."""

    def __init__(
        self,
        pack: Pack,
        transform: Transform,
        requests: Iterator[Request],
        batch: int,
        how: Reading,
    ) -> None: ...

    def next_images(self) -> torch.Tensor:
        """(b, 3, S, S) float32, channels-last, on the device. StopIteration at the end."""

    def close(self) -> None:
        """Stop threads and free buffers; safe to call twice."""


class _Wanted(NamedTuple):
    """What the plan asks for, before unusable records are replaced."""

    ids: np.ndarray
    draws: np.ndarray
    valid: np.ndarray


class Batches:
    """Iterates over a pipeline. `backend` says which one runs; `close` frees its threads and buffers.

    A record that cannot be decoded, or whose checksum is found wrong, is replaced by the next good one of the pool,
    reported, and counted; in evaluation the replacement does not count as valid. Beyond `bad_budget` different
    records a UserError ends the run.
    """

    def __init__(
        self,
        pack: Pack,
        transform: Transform,
        wanted: Iterator[_Wanted],
        batch: int,
        group: int,
        *,
        pool: np.ndarray,
        evaluates: bool,
        position: int,
        how: Reading,
    ):
        how = chosen(how)
        self.backend = how.backend
        self.position: int = position
        """Step, or batch of an evaluation, that comes next. The order is a function of the step alone, so this number
        is the whole state: `first_step=position` goes on with the same samples, augmented alike."""
        self._bad = BadRecords(pack, pool, how.bad_budget)
        self._pack, self._transform, self._batch, self._group = pack, transform, batch, group
        self._evaluates, self._how, self._wanted = evaluates, how, wanted
        self._device = torch.device(how.device)
        self._pending: deque[tuple[_Wanted, Request]] = deque()
        self._pipeline: Pipeline | None = self._start()

    @property
    def bad(self) -> dict[int, str]:
        """Number and fault of each record that was replaced so far."""
        return self._bad.found

    def _start(self) -> Pipeline:
        """A pipeline that goes on with what is pending."""
        again = [wanted for wanted, _ in self._pending]
        self._pending.clear()
        self._wanted = itertools.chain(again, self._wanted)
        return self._make(self._requests(), self._batch, self._how)

    def _make(self, requests: Iterator[Request], batch: int, how: Reading) -> Pipeline:
        make: type[Pipeline]
        if self.backend == "dali":
            from loaders.pipelines.dali import DaliPipeline  # DALI takes a second to import: only when used

            make = DaliPipeline
        else:
            from loaders.pipelines.host import HostPipeline

            make = HostPipeline
        return make(self._pack, self._transform, requests, batch, how)

    def _requests(self) -> Iterator[Request]:
        """Pass the requests on without bad records, remembering what is in flight."""
        for wanted in self._wanted:
            self._pack.check_files(wanted.ids)
            self._bad.check(wanted.ids, self._how.check)
            self._bad.look(wanted.ids)
            one = self._request(wanted)
            self._pending.append((wanted, one))
            yield one

    def _request(self, wanted: _Wanted) -> Request:
        ids, good = self._bad.replaced(wanted.ids)
        valid = wanted.valid & good if self._evaluates else wanted.valid
        return request(self._pack, self._transform, ids, wanted.draws, valid)

    def _next(self) -> Batch:
        if self._pipeline is None:
            raise StopIteration
        while True:
            try:
                images = self._pipeline.next_images()
                break
            except StopIteration:
                self.close()
                raise
            except RuntimeError as error:
                self._pipeline.close()
                self._find_bad(error)
                self._pipeline = self._start()
        _, done = self._pending.popleft()
        labels = torch.from_numpy(np.ascontiguousarray(self._pack.labels[done.ids]))
        extra = [labels, torch.from_numpy(done.ids), torch.from_numpy(done.valid)]
        return Batch(images, *(to_device(tensor, self._device) for tensor in extra))

    def _find_bad(self, error: RuntimeError) -> None:
        """Report the records for which no batch could be made.

        RuntimeError if none is to blame, UserError if none decodes at all: then the decoder is.
        """
        if not self._pending:
            raise error
        wanted, failed = self._pending[0]
        self._pack.check_files(failed.ids)
        unsound = self._pack.unsound(failed.ids)
        reasons = dict.fromkeys(unsound, UNSOUND) or self._one_by_one(wanted, failed)
        if not reasons:
            where = f"records {failed.ids.tolist()}"
            raise RuntimeError(f"{self._pack.path}: a batch could not be made of {where}: {error}") from error
        for record, reason in reasons.items():
            self._bad.report(record, reason)

    def _one_by_one(self, wanted: _Wanted, failed: Request) -> dict[int, str]:
        """Each record of a batch by itself: DALI does not say which one failed, and loses the whole batch."""
        reasons: dict[int, str] = {}
        at, tried = 0, [Request(*(field[i : i + 1] for field in failed)) for i in range(len(failed.ids))]
        record = int(failed.ids[0])
        other = self._bad.other(record) if (failed.ids == record).all() else None
        if other is not None:  # one record cannot tell its own fault from the decoder's
            tried.append(request(self._pack, self._transform, np.array([other]), wanted.draws[:1]))
        how = replace(self._how, prefetch=1)
        while at < len(tried):
            pipeline = self._make(iter(tried[at:]), 1, how)
            try:
                for single in tried[at:]:  # noqa: B007  names the one that fails
                    at += 1
                    pipeline.next_images()
            except RuntimeError as error:
                reasons[int(single.ids[0])] = f"it does not decode: {short(error)}"
                whole_batch = len({int(one.ids[0]) for one in tried[:at]}) == len(reasons) > 1
                if whole_batch and at >= min(len(tried), _ENOUGH):
                    raise nothing_decodes(self._pack.path, len(reasons), self.backend, error) from error
            finally:
                pipeline.close()
        return reasons

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        found = [self._next() for _ in range(self._group)] if self._group else self._next()
        self.position += 1
        return found

    def close(self) -> None:
        """Stop; safe to call twice."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def train_batches(
    pack: Pack, plan: TrainPlan, transform: Transform, *, first_step: int = 0, last_step: int | None = None, **how: Any
) -> Batches:
    """An iterator over steps [first_step, last_step): each a list of one Batch per micro-batch.

    Endless without `last_step`. `how`: the fields of `Reading`.
    """

    def wanted() -> Iterator[_Wanted]:
        step = first_step
        while last_step is None or step < last_step:
            for part in plan.step(step):
                yield _Wanted(part.ids, part.draws, np.ones(len(part.ids), dtype=bool))
            step += 1

    return Batches(
        pack,
        transform,
        wanted(),
        plan.micro_batch,
        len(plan.mine),
        pool=plan.pool,
        evaluates=False,
        position=first_step,
        how=Reading(**how),
    )


def eval_batches(pack: Pack, plan: EvalPlan, transform: Transform, *, first_batch: int = 0, **how: Any) -> Batches:
    """An iterator over the plan's batches from `first_batch` on; `how`: the fields of `Reading`.

    A random transform is drawn at the middle of its ranges; evaluation transforms draw nothing.
    """

    def wanted() -> Iterator[_Wanted]:
        draws = np.full((plan.batch, DRAWS), 0.5)
        for number in range(first_batch, len(plan)):
            ids, valid = plan.batch_ids(number)
            yield _Wanted(ids, draws, valid)

    return Batches(
        pack,
        transform,
        wanted(),
        plan.batch,
        0,
        pool=plan.pool,
        evaluates=True,
        position=first_batch,
        how=Reading(**how),
    )
