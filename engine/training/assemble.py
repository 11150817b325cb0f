"""From configuration to the parts of a run. Building talks to no other rank, so an error here can be told to all
ranks before one waits for another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.comm.communicator import Communicator
from engine.config.schema import AgcSgdConfig, DataConfig, PretrainConfig
from engine.network import bit, weights
from engine.optim.agc_sgd import AgcSgd, named_groups
from engine.optim.flat import FlatParameters
from engine.optim.standardized import StandardizedWeights, choose
from engine.training import checkpoint, feed, objective
from engine.training.evaluate import evaluate, without_auc
from engine.training.feed import Feed
from engine.training.objective import Objective
from engine.training.precision import Precision, prepare_device
from loaders.errors import shorten
from loaders.packs import agree, superset
from loaders.packs.shard import Pack
from loaders.pipelines import transform
from loaders.pipelines.order import Blocks
from loaders.pipelines.transform import Affine, Transform


@dataclass(frozen=True)
class Parts:
    """What a trainer is handed."""

    network: str
    model: bit.Bit
    flat: FlatParameters
    standardized: StandardizedWeights | None
    optimizer: AgcSgd
    objective: Objective
    feed: Feed
    precision: Precision
    about: dict[str, Any]  # what a checkpoint says of itself
    mean_auc: bool = False  # whether single labels are scored by mean AUC too

    def broadcast(self, comm: Communicator) -> None:
        """Give all ranks rank 0's parameters."""
        comm.broadcast_(self.flat.values, "parameters")
        if self.standardized is not None:
            self.standardized.refresh()

    def evaluate(self, comm: Communicator) -> dict[str, float]:
        """Scores on the whole test set, over all ranks."""
        batches = self.feed.test_batches()
        return evaluate(self.model, batches, self.objective, comm, self.precision, mean_auc=self.mean_auc)

    def summary(self, comm: Communicator) -> str:
        """What is about to run, for people."""
        numel = sum(parameter.numel() for parameter in self.flat.parameters)
        return (
            f"{self.network}: {numel:,} parameters, {self.about['num_classes']} classes, {self.objective.name}\n"
            f"{len(self.feed.plan.pool):,} images; batch {self.feed.plan.global_batch} over "
            f"{comm.size} rank{'s' if comm.size > 1 else ''} ({comm.name}); "
            f"{self.precision.name} on {self.precision.device.type}; AGC-SGD: {self.optimizer.implementation}, "
            f"weights standardized in the {'network' if self.standardized is None else 'optimizer'}"
            f"{label_counts(self.feed.train, self.feed.test, self.mean_auc)}"
        )


def build(
    *,
    run: str,
    network: str,
    num_classes: int,
    state: dict[str, torch.Tensor] | None,
    channels_last: bool,
    optim: AgcSgdConfig,
    lr: float,
    feed: Feed,
    precision: Precision,
    mean_auc: bool = False,
) -> Parts:
    """Network, flat buffers and optimizer around `feed`; `state`: weights to start from, with a new head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(feed.plan.seed)
        model = bit.build(network, num_classes)
    if state is not None:
        weights.apply(model, state, new_head=True)
    model.to(precision.device)
    flat = FlatParameters(model, channels_last=channels_last)
    standardized = choose(model, flat, precision.compute_dtype, optim.standardize, optim.implementation)
    return Parts(
        network=network,
        model=model,
        flat=flat,
        standardized=standardized,
        optimizer=AgcSgd(
            named_groups(model, optim.weight_decay, optim.no_decay),
            lr=lr,
            momentum=optim.momentum,
            nesterov=optim.nesterov,
            clipping=optim.clipping,
            eps=optim.eps,
            implementation=optim.implementation,
            forward_weights=None if standardized is None else standardized.forward_weights,
        ),
        objective=objective.choose(feed.train.labels),
        feed=feed,
        precision=precision,
        mean_auc=mean_auc,
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
        },
    )


def label_counts(train: Pack, test: Pack | None, mean_auc: bool) -> str:
    """Counts of label vectors, and which labels cannot be scored: lines for people, each after a line break."""
    said, vectors = "", train.labels.ndim > 1
    if vectors:
        said += "\n" + superset.counts(train.labels, train.class_names, train.parts)
    missing = without_auc(test.labels, test.class_names) if test and (vectors or mean_auc) else []
    if test and missing:
        said += (
            f"\n{len(missing)} of {len(test.class_names)} labels have no AUC and are not in its mean, since the test "
            f"set knows only one value of them: {shorten(missing)}"
        )
    return said


def pretraining(config: PretrainConfig, comm: Communicator) -> Parts:
    """The parts of a pre-training run."""
    precision = prepare_device(config.train.precision, config.train.device, comm)
    train = Pack.open(config.data.train)
    test = None if config.data.val is None else agree.open_test(config.data.val, train)
    num_classes = config.model.num_classes or len(train.class_names)
    agree.check_labels(train, num_classes)
    step = config.train
    plan = feed.order(
        np.arange(len(train)),
        step.global_batch,
        step.accumulate,
        step.seed,
        comm,
        last=config.data.last,
        blocks=Blocks(config.data.block, config.data.window) if config.data.shuffle == "blocks" else None,
        starts=train.starts,
    )
    return build(
        run=config.name,
        network=config.model.name,
        num_classes=num_classes,
        state=None if config.model.weights is None else read_weights(config.model.weights)[0],
        channels_last=config.model.channels_last,
        optim=config.optim,
        lr=config.optim.base_lr,
        feed=Feed(train, test, plan, *transforms(config.data), config.data, precision.device),
        precision=precision,
    )


def transforms(config: DataConfig) -> tuple[Transform, Transform]:
    """Training and evaluation transform of a pre-training run."""
    size = config.size
    resize = config.resize or round(size * 256 / 224)
    if config.augment == "xray":
        affine = Affine(config.rotation, (config.zoom[0], config.zoom[1]), config.translation)
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


def read_weights(place: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and, where it is one of our checkpoints, its description; any format of docs/weights.md."""
    path = Path(place)
    if path.is_dir():
        folder = checkpoint.find(path)
        checkpoint.check_weights(folder)
        return weights.load(folder / checkpoint.WEIGHTS), checkpoint.describe(folder)
    return weights.load(path), {}
