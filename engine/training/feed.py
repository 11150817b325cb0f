"""The data side of a run: packs, the order of samples, transforms, and the pipelines that turn them into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.comm.communicator import Communicator
from engine.config.data import DataConfig, TargetConfig
from loaders.packs.shard import Pack
from loaders.pipelines import batches
from loaders.pipelines.batches import Batch
from loaders.pipelines.order import Blocks, EvalPlan, TrainPlan
from loaders.pipelines.transform import Transform


@dataclass(frozen=True)
class Feed:
    """What this rank reads."""

    train: Pack
    test: Pack | None
    plan: TrainPlan  # which samples each step takes, and this rank's share
    train_transform: Transform
    test_transform: Transform
    config: DataConfig | TargetConfig  # backend, threads, prefetch
    device: torch.device
    test_ids: np.ndarray | None = None  # of `test`; None: all of it

    @property
    def tested(self) -> np.ndarray:
        """Ids into `test` of what is evaluated on."""
        return np.arange(0 if self.test is None else len(self.test)) if self.test_ids is None else self.test_ids

    def train_batches(self, first_step: int, last_step: int) -> Iterator[Sequence[Batch]]:
        """The micro-batches of steps `first_step` to `last_step` (exclusive)."""
        return batches.train_batches(
            self.train, self.plan, self.train_transform, first_step=first_step, last_step=last_step, **self._how()
        )

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of one step, by itself."""
        with batches.train_batches(
            self.train, self.plan, self.train_transform, first_step=step, last_step=step + 1, **self._how()
        ) as one:
            return [batch._replace(images=batch.images.clone()) for batch in next(one)]

    def test_batches(self) -> Iterator[Batch]:
        """This rank's share of what is evaluated on."""
        if self.test is None:
            raise AssertionError("a run without a test set is not evaluated")
        whole = EvalPlan(pool=self.tested, batch=self.plan.micro_batch, rank=self.plan.rank, world=self.plan.world)
        return batches.eval_batches(self.test, whole, self.test_transform, **self._how())

    def _how(self) -> dict:
        return {
            "backend": self.config.backend,
            "decode": self.config.decode,
            "region": self.config.region,
            "device": str(self.device),
            "threads": self.config.threads,
            "prefetch": self.config.prefetch,
            "check": self.config.check,
            "bad_budget": self.config.bad_budget,
        }


def order(
    pool: np.ndarray,
    global_batch: int,
    accumulate: int,
    seed: int,
    comm: Communicator,
    *,
    micro: str | None = None,
    last: str = "wrap",
    blocks: Blocks | None = None,
    starts: tuple[int, ...] = (),
) -> TrainPlan:
    """The sample order over `pool` (ids into the training pack) as this rank sees it.

    micro: images in a micro-batch; "auto", before it is known: one, so many micro-batches that `accumulate` says none.
    """
    auto = micro == "auto"
    return TrainPlan(
        pool=pool,
        global_batch=global_batch,
        seed=seed,
        rank=comm.rank,
        world=comm.size,
        accumulate=1 if auto else accumulate,
        micro=1 if auto else None if micro is None else int(micro),
        last=last,
        blocks=blocks,
        starts=starts,
    )
