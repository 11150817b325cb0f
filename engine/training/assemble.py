"""From configuration to the parts of a run. Building talks to no other rank, so an error here can be told to all
ranks before one waits for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.comm.communicator import Communicator
from engine.config.data import DataConfig
from engine.config.schema import AgcSgdConfig, PretrainConfig
from engine.network import choose as choose_network
from engine.network import family, weights
from engine.optim.agc_sgd import AgcSgd
from engine.optim.flat import FlatParameters
from engine.optim.groups import named_groups
from engine.optim.standardized import StandardizedWeights, choose
from engine.saving import checkpoint
from engine.training import feed, objective, reproducible
from engine.training.evaluate import evaluate, majority, without_auc
from engine.training.feed import Feed
from engine.training.objective import Objective
from engine.training.precision import Precision, prepare_device
from loaders.errors import shorten
from loaders.packs import agree, holdout, superset
from loaders.packs.shard import Pack
from loaders.pipelines import transform
from loaders.pipelines.order import Blocks
from loaders.pipelines.transform import Affine, Transform


@dataclass(frozen=True)
class Parts:
    """What a trainer is handed."""

    network: str
    recompute: str  # see engine.network.recompute
    model: nn.Module
    flat: FlatParameters
    standardized: StandardizedWeights | None
    optimizer: AgcSgd
    objective: Objective
    feed: Feed
    precision: Precision
    about: dict[str, Any]  # what a checkpoint says of itself
    mean_auc: bool = False  # whether single labels are scored by mean AUC too
    shared: str = ""  # what there is to say of images that are both trained and scored on; on rank 0
    each_class: bool = False  # whether classes are scored one by one, and the score has an interval
    said: tuple[str, ...] = ()  # what was done to read the weights that it starts from, for people

    def broadcast(self, comm: Communicator) -> None:
        """Give all ranks rank 0's parameters."""
        comm.broadcast_(self.flat.values, "parameters")
        if self.standardized is not None:
            self.standardized.refresh()

    def evaluate(self, comm: Communicator) -> dict[str, float]:
        """Scores on the whole test set, over all ranks; running statistics, where a network has them, are rank 0's."""
        for name, buffer in self.model.named_buffers():
            if buffer.is_floating_point():
                comm.broadcast_(buffer, f"buffers.{name}")
        batches = self.feed.test_batches()
        names = self.feed.train.class_names if self.each_class else ()
        return evaluate(
            self.model, batches, self.objective, comm, self.precision, mean_auc=self.mean_auc, class_names=names
        )

    @property
    def majority(self) -> float | None:
        """Top-1 in percent of who always says the most frequent class of what is scored on; None of label vectors."""
        return None if self.feed.test is None else majority(self.feed.test.labels[self.feed.tested])

    def summary(self, comm: Communicator) -> str:
        """What is about to run, for people."""
        numel = sum(parameter.numel() for parameter in self.flat.parameters)
        start = "".join(f"weights: {each}\n" for each in self.said)
        return start + (
            f"{self.network}: {numel:,} parameters, {self.about['num_classes']} classes, {self.objective.name}\n"
            f"{len(self.feed.plan.pool):,} images; batch {self.feed.plan.global_batch} over "
            f"{comm.size} rank{'s' if comm.size > 1 else ''} ({comm.name}); "
            f"{self.precision.name} on {self.precision.device.type}; AGC-SGD: {self.optimizer.implementation}"
            f"{self._standardized_where()}"
            f"{label_counts(self.feed.train, self.feed.test, self.mean_auc, self.feed.test_ids)}"
            + (f"\n{self.shared}" if self.shared else "")
        )

    def _standardized_where(self) -> str:
        if family.is_timm(self.network):
            return ""
        return f", weights standardized in the {'network' if self.standardized is None else 'optimizer'}"


def build(
    *,
    run: str,
    network: str,
    num_classes: int,
    state: dict[str, torch.Tensor] | None,
    said: Sequence[str] = (),
    channels_last: bool,
    recompute: str,
    optim: AgcSgdConfig,
    lr: float,
    feed: Feed,
    precision: Precision,
    shared: str = "",
    mean_auc: bool = False,
    zero_head: bool = True,
    balanced: bool = False,
) -> Parts:
    """Network, flat buffers and optimizer around `feed`; `state`: weights to start from, with a new head; `said`: what
    was done to read them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(feed.plan.seed)
        model = choose_network.build(
            network, num_classes, feed.test_transform.size, zero_head=zero_head, recompute=recompute
        )
    if precision.reproducible:
        reproducible.check_network(model, network)
    head = choose_network.head(model)
    if state is not None:
        weights.apply(model, state, new_head=True, head=f"{head}.")
    model.to(precision.device)
    flat = FlatParameters(model, channels_last=channels_last)
    trained_on = feed.train.labels[feed.plan.pool] if balanced else feed.train.labels
    standardized = choose(model, flat, precision.compute_dtype, optim.standardize, optim.implementation)
    return Parts(
        network=network,
        recompute=recompute,
        model=model,
        flat=flat,
        standardized=standardized,
        optimizer=AgcSgd(
            named_groups(model, optim.weight_decay, optim.no_decay, head),
            lr=lr,
            momentum=optim.momentum,
            nesterov=optim.nesterov,
            clipping=optim.clipping,
            eps=optim.eps,
            implementation=optim.implementation,
            forward_weights=None if standardized is None else standardized.forward_weights,
        ),
        objective=objective.choose(trained_on, balanced, num_classes, precision.device),
        feed=feed,
        precision=precision,
        shared=shared,
        mean_auc=mean_auc,
        said=tuple(said),
        about={
            "format": 1,
            "run": run,
            "network": network,
            "num_classes": num_classes,
            "global_batch": feed.plan.global_batch,
            "class_names": list(feed.train.class_names),
            "size": feed.test_transform.size,
            "mean": list(feed.test_transform.mean),
            "std": list(feed.test_transform.std),
            "several_labels": feed.train.labels.ndim > 1,
            "transform": transform.as_fields(feed.test_transform),
            "precision": precision.name,
        }
        | (
            reproducible.described(precision.device, feed.plan.micro_batch, feed.config.backend)
            if precision.reproducible
            else {}
        ),
    )


def label_counts(train: Pack, test: Pack | None, mean_auc: bool, test_ids: np.ndarray | None = None) -> str:
    """Counts of label vectors, and which labels cannot be scored: lines for people, each after a line break.

    `test_ids`: of what is scored on; None: all of it.
    """
    said, vectors = "", train.labels.ndim > 1
    if vectors:
        said += "\n" + superset.counts(train.labels, train.class_names, train.parts)
    missing = (
        without_auc(test.labels[slice(None) if test_ids is None else test_ids], test.class_names)
        if test and (vectors or mean_auc)
        else []
    )
    if test and missing:
        said += (
            f"\n{len(missing)} of {len(test.class_names)} labels have no AUC and are not in its mean, since the test "
            f"set knows only one value of them: {shorten(missing)}"
        )
    return said


def scored_on_what_is_trained_on(
    train: Pack,
    pool: np.ndarray,
    test: Pack | None,
    held: np.ndarray | None,
    name: str,
    overlap: str,
    comm: Communicator,
) -> str:
    """What rank 0 finds of `agree.shared`, of the records `pool` of `train` and `held` of `test`; None: all of it.

    name: the key that has `test`; overlap: as data.overlap.
    """
    if test is None or not comm.leads:
        return ""
    keys = "data.train", name if held is None else "its holdout"
    return agree.shared(train, test, keys, overlap, (pool, np.arange(len(test)) if held is None else held))


def pretraining(config: PretrainConfig, comm: Communicator) -> Parts:
    """The parts of a pre-training run."""
    step = config.train
    precision = prepare_device(step.precision, step.device, comm, reproducible=step.reproducible)
    data = reproducible.decoded_alike(config.data) if step.reproducible else config.data
    train = agree.open_train(config.data.train)
    pool, held = holdout.parts(train, config.data.holdout)
    test = train if held is not None else None if config.data.val is None else agree.open_test(config.data.val, train)
    shared = scored_on_what_is_trained_on(train, pool, test, held, "data.val", config.data.overlap, comm)
    num_classes = config.model.num_classes or len(train.class_names)
    agree.check_labels(train, num_classes)
    plan = feed.order(
        pool,
        step.global_batch,
        step.accumulate,
        step.seed,
        comm,
        micro=step.micro_batch,
        last=config.data.last,
        blocks=Blocks(config.data.block, config.data.window) if config.data.shuffle == "blocks" else None,
        starts=tuple(np.searchsorted(pool, train.starts).tolist()),
    )
    state, _, said = (None, {}, []) if config.model.weights is None else read_weights(config.model.weights)
    return build(
        run=config.name,
        network=config.model.name,
        num_classes=num_classes,
        state=state,
        said=said,
        channels_last=config.model.channels_last,
        recompute=config.model.recompute,
        optim=config.optim,
        lr=config.optim.base_lr,
        feed=Feed(train, test, plan, *transforms(data), data, precision.device, held),
        precision=precision,
        shared=shared,
        balanced=step.class_weights == "balanced",
    )


def transforms(config: DataConfig) -> tuple[Transform, Transform]:
    """Training and evaluation transform of a pre-training run."""
    training, evaluation = _transforms(config)
    return replace(training, downscale=config.downscale), replace(evaluation, downscale=config.downscale)


def _transforms(config: DataConfig) -> tuple[Transform, Transform]:
    size = config.size
    resize = config.resize or round(size * 256 / 224)
    if config.augment == "xray":
        affine = Affine(config.rotation, (config.zoom[0], config.zoom[1]), config.translation, config.outside)
        return replace(transform.xray_train(size), affine=affine, flip=config.flip), transform.xray_eval(size)
    evaluation = transform.natural_eval(size, resize)
    if config.augment == "none":
        return evaluation, evaluation
    if config.augment == "crop":
        return replace(evaluation, kind="random_crop", flip=config.flip), evaluation
    chosen = config.randaugment
    randaugment = None if chosen is None else (chosen[0], chosen[1])
    training = transform.natural_train(size, randaugment)
    return replace(training, scale=(config.scale[0], config.scale[1]), flip=config.flip), evaluation


def read_weights(place: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """Weights; where it is one of our checkpoints, its description; and what had to be done to read them, for people.
    Any format of docs/weights.md."""
    path, about = Path(place), {}
    if path.is_dir():
        folder = checkpoint.find(path)
        checkpoint.check_weights(folder)
        path, about = folder / checkpoint.WEIGHTS, checkpoint.describe(folder)
    state, said = weights.read(path)
    return state, about, said
