"""The data side of a run: packs, the order of samples, transforms, and the pipelines that turn them into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.comm.communicator import Communicator
from engine.config.schema import DataConfig, TargetConfig
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

    def train_batches(self, first_step: int, last_step: int) -> Iterator[Sequence[Batch]]:
        """The micro-batches of steps `first_step` to `last_step` (exclusive)."""
        return batches.train_batches(
            self.train, self.plan, self.train_transform, first_step=first_step, last_step=last_step, **self._how()
        )

    def test_batches(self) -> Iterator[Batch]:
        """This rank's share of the whole test set."""
        if self.test is None:
            raise AssertionError("a run without a test set is not evaluated")
        share = self.plan.global_batch // self.plan.world // self.plan.accumulate
        whole = EvalPlan(pool=np.arange(len(self.test)), batch=share, rank=self.plan.rank, world=self.plan.world)
        return batches.eval_batches(self.test, whole, self.test_transform, **self._how())

    def _how(self) -> dict:
        return {
            "backend": self.config.backend,
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
    last: str = "wrap",
    blocks: Blocks | None = None,
    starts: tuple[int, ...] = (),
) -> TrainPlan:
    """The sample order over `pool` (ids into the training pack) as this rank sees it."""
    return TrainPlan(
        pool=pool,
        global_batch=global_batch,
        seed=seed,
        rank=comm.rank,
        world=comm.size,
        accumulate=accumulate,
        last=last,
        blocks=blocks,
        starts=starts,
    )
