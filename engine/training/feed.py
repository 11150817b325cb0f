"""The data side of a run: packs, the order of samples, transforms, and the pipelines that turn them into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.comm.communicator import Communicator
from engine.config.schema import DataConfig, TargetConfig
from loaders.errors import UserError
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


def open_test(place: str | Sequence[str], train: Pack) -> Pack:
    """The pack or packs to score on, of which label vectors are read with the labels that `train` has.

    UserError where they have other classes.
    """
    test = Pack.open(place, labels=None if train.labels.ndim == 1 else train.class_names)
    check_same_classes(train, test)
    return test


def check_labels(pack: Pack, num_classes: int) -> None:
    """UserError unless the pack's labels fit a head of `num_classes` outputs."""
    if pack.labels.ndim == 2:
        found = pack.labels.shape[1]
        if found != num_classes:
            raise UserError(f"pack {pack.path} has {found} labels per image, but the head {num_classes} outputs")
        return
    largest = int(pack.labels.max(initial=-1))
    if largest >= num_classes:
        raise UserError(
            f"pack {pack.path} holds label {largest} ({len(pack.class_names)} classes), but the head has only "
            f"{num_classes} outputs; set model.num_classes={max(largest + 1, len(pack.class_names))} or leave it out"
        )


def check_same_classes(train: Pack, other: Pack) -> None:
    """UserError unless both packs number the same classes alike."""
    if train.labels.ndim != other.labels.ndim:
        single, vector = (train, other) if train.labels.ndim == 1 else (other, train)
        raise UserError(
            f"{single.path} has one class per image and {vector.path} label vectors; one cannot be scored on the other"
        )
    if list(train.class_names) != list(other.class_names):
        only = sorted(set(other.class_names) ^ set(train.class_names))[:5]
        raise UserError(
            f"{other.path} does not have the classes of {train.path}: {len(other.class_names)} against "
            f"{len(train.class_names)}" + (f", differing in {', '.join(only)}" if only else ", in another order")
        )
