"""What fine-tuning adds to training: the target, its shots, the BiT-HyperRule, the new head, MixUp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.comm.communicator import Communicator
from engine.config.schema import AUTO, FinetuneConfig
from engine.network import bit, weights
from engine.training import assemble, feed, losses, reproducible
from engine.training.feed import Feed
from engine.training.precision import prepare_device
from engine.training.timetable import Timetable
from engine.training.trainer import Mix
from engine.transfer import fewshot, hyperrule
from engine.transfer.hyperrule import HyperRule
from loaders.errors import UserError
from loaders.packs import agree, holdout
from loaders.packs.shard import Pack
from loaders.pipelines import transform
from loaders.pipelines.batches import Batch
from loaders.pipelines.transform import Affine, Channels, Transform


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
    mix: Mix | None
    scored: Feed  # with what the score is of
    weights: str | None  # digest of what is transferred: tells apart what has one name; None: random

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
    precision = prepare_device(config.precision, config.device, comm, reproducible=config.reproducible)
    data = reproducible.decoded_alike(config.data) if config.reproducible else config.data
    train = agree.open_train(config.data.train)
    rest, held = _scored_part(train, config)
    test = train if held is not None else agree.open_test(config.data.test, train)
    val, chosen = None, None
    if (share := config.data.val_share) is not None:
        val, (rest, chosen) = train, holdout.parts(train, share, rest, "data.val")
    elif config.data.val is not None:
        val = agree.open_test(config.data.val, train)
    shared = [
        assemble.scored_on_what_is_trained_on(train, rest, pack, ids, f"data.{name}", config.data.overlap, comm)
        for pack, ids, name in ((test, held, "test"), (val, chosen, "val"))
    ]
    source = _source(config)
    pool = rest[fewshot.draw(train.labels[rest], config.shots, config.seed)]
    short = fewshot.short_classes(train.labels[rest], config.shots, len(train.class_names))
    height, width = np.median(train.sizes[pool], axis=0).astype(int)
    rule = hyperrule.rule(len(pool), int(height), int(width))
    mixup = rule.mixup if config.rule.mixup is None else config.rule.mixup
    balanced = config.data.oversample and not fewshot.per_class(config.shots)
    drawn = fewshot.oversample(train.labels, pool, config.seed) if balanced else pool
    order = feed.order(drawn, config.batch, config.accumulate, config.seed, comm, micro=config.micro_batch)
    scored = Feed(train, test, order, *transforms(config, rule, source.about), data, precision.device, held)
    parts = assemble.build(
        run=_run_name(config),
        network=source.network,
        num_classes=len(train.class_names),
        state=source.state,
        said=source.said,
        channels_last=config.channels_last,
        recompute=config.recompute,
        optim=config.optim,
        lr=config.lr,
        feed=scored if val is None else replace(scored, test=val, test_ids=chosen),
        precision=precision,
        shared="\n".join(filter(None, shared)),
        mean_auc=config.data.metric == "mean_auc",
        zero_head=config.head == "zero",
        balanced=config.class_weights == "balanced",
    )
    name = config.data.name or "+".join(name for name, *_ in train.parts)
    plan = Plan(
        network=source.network,
        source=source.name,
        dataset=name if held is None else f"{name.removesuffix('-train')}_{_held_name(config)}",
        train_images=len(pool),
        shots=config.shots,
        short={train.class_names[index]: count for index, count in short.items()},
        times=_times(config, rule, len(drawn)),
        mixup=mixup,
        mix=mixer(mixup, config.seed, len(train.class_names)) if mixup else None,
        scored=scored,
        weights=source.digest,
    )
    return parts, plan


def _scored_part(train: Pack, config: FinetuneConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids of what may be trained on, and of what is held out to be scored on; None: nothing."""
    if config.folds is not None and config.fold is not None:
        return holdout.fold(train, config.folds, config.fold)
    return holdout.parts(train, config.data.holdout)


def _held_name(config: FinetuneConfig) -> str:
    return "holdout" if config.fold is None else f"fold{config.fold}of{config.folds}"


def _run_name(config: FinetuneConfig) -> str:
    """The run's own: that of its folder, since many runs have one recipe."""
    return Path(config.folder).resolve().name if config.folder not in (None, AUTO) else config.name


@dataclass(frozen=True)
class Source:
    """What is transferred."""

    network: str
    name: str  # for people and result lines
    state: dict[str, torch.Tensor] | None  # None: random weights
    about: dict[str, Any]  # what one of our checkpoints says of itself; empty for others
    said: tuple[str, ...] = ()  # what was done to read the weights, for people

    @property
    def digest(self) -> str | None:
        """Of the weights, None of random ones: tells apart what has one name."""
        return None if self.state is None else weights.digest(self.state)


def _source(config: FinetuneConfig) -> Source:
    if config.from_ == "random":
        if config.model is None:
            raise UserError(f"from=random needs model=…, one of {', '.join(bit.MEMBERS)}, or timm/NAME")
        return Source(config.model, config.source or "random", None, {})
    state, about, said = assemble.read_weights(config.from_)
    network = config.model or about.get("network") or weights.member(state)
    if network is None:
        known = ", ".join(bit.MEMBERS)
        raise UserError(f"{config.from_} does not say which network it is; say model=…, one of {known}, or timm/NAME")
    return Source(network, config.source or about.get("run") or Path(config.from_).name, state, about, tuple(said))


def transforms(config: FinetuneConfig, rule: HyperRule, about: Mapping[str, Any]) -> tuple[Transform, Transform]:
    """Training and evaluation transform: the rule's sizes, unless the configuration has its own.

    Pixels are normalized as in pre-training, as the published runs did, where `about` (of the checkpoint) says how.
    """
    if config.data.augment == "xray":
        size = config.data.size or 224
        affine = Affine(translate=config.data.translation, outside=config.data.outside)
        pair = replace(transform.xray_train(size), affine=affine), transform.xray_eval(size)
    else:
        size = config.data.size or rule.crop
        resize = config.data.resize or round(size * rule.resize / rule.crop)
        if resize < size:
            raise UserError(f"data.resize={resize} is less than the size of {size}; nothing could be cropped")
        kind = "random_short_crop" if config.data.aspect == "keep" else "random_crop"
        pair = replace(transform.bit_train(resize, size), kind=kind), transform.bit_eval(size)
    mean, std = _statistics(config.data.normalize, about)
    train, test = (replace(each, mean=mean, std=std, downscale=config.data.downscale) for each in pair)
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
    """The rule's schedule; where `rule.steps` says so, in proportion, or cut off or going on at its last rate."""
    total = config.rule.steps or rule.steps
    share = total / rule.steps if config.rule.stretch else 1.0
    shift = int(config.rule.timing == "published")
    times = Timetable(
        total_steps=total,
        warmup_steps=round(rule.warmup * share),
        milestones=tuple(sorted({round(step * share) + shift for step in rule.milestones} - {shift})),  # or fewer
        steps_per_epoch=samples / config.batch,
        kind="step",
        peak=config.lr,
        factor=0.1,
        ahead=shift,
    )
    times.learning_rate(0)  # checks that the parts fit
    return times


def mixer(alpha: float, seed: int, num_classes: int) -> Mix:
    """MixUp with the sample that had the same place in the global batch a step before. One share per step.

    Both are functions of (seed, step, place in the global batch), so neither the number of ranks and micro-batches nor
    a resumption changes them. Samples come in random order, so partners are random.
    """

    def mix(step: int, batch: Batch, before: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        share = losses.mixup_share(alpha, np.random.Generator(np.random.Philox(key=[seed, step])).random())
        return losses.mixup(batch.images, batch.labels, before.images, before.labels, share, num_classes)

    return mix
