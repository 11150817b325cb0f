"""What fine-tuning adds to training: the target, its shots, the BiT-HyperRule, the new head, MixUp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.comm.communicator import Communicator
from engine.config.schema import FinetuneConfig
from engine.network import bit, weights
from engine.training import assemble, feed, losses
from engine.training.feed import Feed
from engine.training.precision import prepare_device
from engine.training.timetable import Timetable
from engine.training.trainer import Mix, unmixed
from engine.transfer import fewshot, hyperrule
from engine.transfer.hyperrule import HyperRule
from loaders.errors import UserError
from loaders.packs import agree
from loaders.packs.shard import Pack
from loaders.pipelines import transform
from loaders.pipelines.batches import Batch
from loaders.pipelines.transform import Channels, Transform


@dataclass(frozen=True)
class Plan:
    """What is transferred where, and how."""

    network: str
    source: str  # name of what the weights come from, for people and result lines
    dataset: str
    train_images: int  # distinct images trained on
    shots: str
    short: dict[str, int]  # classes with fewer images than shots: name → images
    times: Timetable
    mixup: float  # alpha; 0: off
    mix: Mix

    @property
    def title(self) -> str:
        return f"{self.source} → {self.dataset}, {fewshot.in_words(self.shots)}"

    def describe(self) -> str:
        """For people: the settings that the rule chose, and classes that have too few images."""
        lines = [
            f"{self.title}: {self.train_images:,} images; {self.times.total_steps} steps, ÷10 at "
            f"{', '.join(map(str, self.times.milestones))}, warm-up {self.times.warmup_steps}; "
            f"MixUp {self.mixup or 'off'}"
        ]
        return "\n".join([*lines, *([fewshot.shortage(self.shots, self.short)] if self.short else [])])


def finetuning(config: FinetuneConfig, comm: Communicator) -> tuple[assemble.Parts, Plan]:
    """The parts of a fine-tuning run, and its plan."""
    precision = prepare_device(config.precision, config.device, comm)
    train = Pack.open(config.data.train)
    test = agree.open_test(config.data.test, train)
    source = _source(config)
    pool = fewshot.draw(train.labels, config.shots, config.seed)
    short = fewshot.short_classes(train.labels, config.shots, len(train.class_names))
    height, width = np.median(train.sizes[pool], axis=0).astype(int)
    rule = hyperrule.rule(len(pool), int(height), int(width))
    mixup = rule.mixup if config.rule.mixup is None else config.rule.mixup
    balanced = config.data.oversample and config.shots == "full"
    drawn = fewshot.oversample(train.labels, pool, config.seed) if balanced else pool
    order = feed.order(drawn, config.batch, config.accumulate, config.seed, comm)
    parts = assemble.build(
        run=config.name,
        network=source.network,
        num_classes=len(train.class_names),
        state=source.state,
        channels_last=config.channels_last,
        optim=config.optim,
        lr=config.lr,
        feed=Feed(train, test, order, *transforms(config, rule, source.about), config.data, precision.device),
        precision=precision,
        mean_auc=config.data.metric == "mean_auc",
    )
    plan = Plan(
        network=source.network,
        source=source.name,
        dataset=config.data.name or "+".join(name for name, *_ in train.parts),
        train_images=len(pool),
        shots=config.shots,
        short={train.class_names[index]: count for index, count in short.items()},
        times=_times(config, rule, len(drawn)),
        mixup=mixup,
        mix=mixer(mixup, config.seed, comm.rank, len(train.class_names)) if mixup else unmixed,
    )
    return parts, plan


@dataclass(frozen=True)
class Source:
    """What is transferred."""

    network: str
    name: str  # for people and result lines
    state: dict[str, torch.Tensor] | None  # None: random weights
    about: dict[str, Any]  # what one of our checkpoints says of itself; empty for others


def _source(config: FinetuneConfig) -> Source:
    if config.from_ == "random":
        if config.model is None:
            raise UserError(f"from=random needs model=…, one of {', '.join(bit.MEMBERS)}")
        return Source(config.model, config.source or "random", None, {})
    state, about = assemble.read_weights(config.from_)
    network = config.model or about.get("network") or weights.member(state)
    if network is None:
        known = ", ".join(bit.MEMBERS)
        raise UserError(f"{config.from_} does not say which network it is; say model=…, one of {known}")
    return Source(network, config.source or about.get("run") or Path(config.from_).name, state, about)


def transforms(config: FinetuneConfig, rule: HyperRule, about: Mapping[str, Any]) -> tuple[Transform, Transform]:
    """Training and evaluation transform: the rule's sizes, unless the configuration has its own.

    Pixels are normalized as in pre-training, as the published runs did, where `about` (of the checkpoint) says how.
    """
    if config.data.augment == "xray":
        size = config.data.size or 224
        pair = transform.xray_train(size), transform.xray_eval(size)
    else:
        size = config.data.size or rule.crop
        resize = config.data.resize or round(size * rule.resize / rule.crop)
        if resize < size:
            raise UserError(f"data.resize={resize} is less than the size of {size}; nothing could be cropped")
        pair = transform.bit_train(resize, size), transform.bit_eval(size)
    mean, std = _statistics(config.data.normalize, about)
    train, test = (replace(each, mean=mean, std=std) for each in pair)
    return replace(train, flip=config.data.flip), test


def _statistics(normalize: str, about: Mapping[str, Any]) -> tuple[Channels, Channels]:
    if normalize == "imagenet":
        return transform.IMAGENET_MEAN, transform.IMAGENET_STD
    half = (0.5, 0.5, 0.5)
    if normalize == "half":
        return half, half
    mean, std = (about.get(name, half) for name in ("mean", "std"))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _times(config: FinetuneConfig, rule: HyperRule, samples: int) -> Timetable:
    """The rule's schedule, shortened or lengthened in proportion where `rule.steps` says so."""
    total = config.rule.steps or rule.steps
    share = total / rule.steps
    return Timetable(
        total_steps=total,
        warmup_steps=round(rule.warmup * share),
        milestones=tuple(sorted({round(step * share) for step in rule.milestones} - {0})),  # short runs have fewer
        steps_per_epoch=samples / config.batch,
        kind="step",
        peak=config.lr,
        factor=0.1,
    )


def mixer(alpha: float, seed: int, rank: int, num_classes: int) -> Mix:
    """MixUp with partners from the same micro-batch. One share per step, the same on all ranks.

    The share is a function of (seed, step), the partners of (seed, step, rank): a resumed run mixes alike on the
    same number of ranks.
    """

    def mix(step: int, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        share = losses.mixup_share(alpha, np.random.Generator(np.random.Philox(key=[seed, step])).random())
        partners = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, rank + 1]))
        order = torch.from_numpy(partners.permutation(len(batch.images))).to(batch.images.device)
        return losses.mixup(batch.images, batch.labels, share, order, num_classes)

    return mix
