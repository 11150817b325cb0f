"""From configuration to the parts of a run. Nothing here talks to other ranks except `Parts.broadcast` and
`Parts.evaluate`; so an error here can be told to all before anyone waits for anyone."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine import bit, checkpoint, objective, weights
from engine.comm import Communicator
from engine.config import AgcSgdConfig, DataConfig, PretrainConfig
from engine.evaluate import evaluate
from engine.flat import FlatParameters
from engine.objective import Objective
from engine.optim import AgcSgd, named_groups
from engine.precision import Precision
from loaders import batches, transform
from loaders.batches import Batch
from loaders.errors import UserError
from loaders.order import EvalPlan, TrainPlan
from loaders.shard import Pack
from loaders.transform import Transform


@dataclass(frozen=True)
class Parts:
    """What a trainer is handed."""

    device: torch.device
    precision: Precision
    train: Pack
    val: Pack | None
    objective: Objective
    model: nn.Module
    flat: FlatParameters
    optimizer: AgcSgd
    about: dict[str, Any]  # what a checkpoint says of itself
    train_batches: Callable[[int, int], Iterator[Sequence[Batch]]]  # first step, last step → micro-batches
    evaluate: Callable[[], dict[str, float]]  # scores on `val`

    def broadcast(self, comm: Communicator) -> None:
        """Give all ranks rank 0's parameters."""
        comm.broadcast_(self.flat.values, "parameters")


def pretraining(config: PretrainConfig, comm: Communicator) -> Parts:
    """The parts of a pre-training run."""
    device = choose_device(config.train.device, comm)
    precision = Precision(config.train.precision, device)
    precision.prepare()
    train = Pack.open(config.data.train)
    val = None if config.data.val is None else Pack.open(config.data.val)
    num_classes = config.model.num_classes or len(train.class_names)
    check_labels(train, num_classes, "training")
    if val is not None:
        same_classes(train, val)
    model = build_model(config.model.name, num_classes, config.train.seed)
    if config.model.weights is not None:
        weights.apply(model, read_weights(config.model.weights)[0], new_head=True)
    channels_last = config.model.channels_last
    model.to(device)
    flat = FlatParameters(model, channels_last=channels_last)
    plan = TrainPlan(
        pool=np.arange(len(train)),
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        rank=comm.rank,
        world=comm.size,
        accumulate=config.train.accumulate,
    )
    what = objective.choose(train.labels)
    train_transform, eval_transform = transforms(config.data)
    reading = {
        "backend": config.data.backend,
        "device": str(device),
        "threads": config.data.threads,
        "prefetch": config.data.prefetch,
    }

    def train_batches(first_step: int, last_step: int) -> Iterator[Sequence[Batch]]:
        return batches.train_batches(train, plan, train_transform, first_step=first_step, last_step=last_step, **reading)

    share = config.train.global_batch // comm.size // config.train.accumulate

    def score() -> dict[str, float]:
        plan = EvalPlan(pool=np.arange(len(val)), batch=share, rank=comm.rank, world=comm.size)
        return evaluate(model, batches.eval_batches(val, plan, eval_transform, **reading), what, comm, precision)

    return Parts(
        device=device,
        precision=precision,
        train=train,
        val=val,
        objective=what,
        model=model,
        flat=flat,
        optimizer=build_optimizer(model, config.optim, lr=0.0),
        about={
            "format": 1,
            "run": config.name,
            "network": config.model.name,
            "num_classes": num_classes,
            "class_names": list(train.class_names),
            "size": config.data.size,
            "mean": list(eval_transform.mean),
            "std": list(eval_transform.std),
        },
        train_batches=train_batches,
        evaluate=score,
    )


def transforms(config: DataConfig) -> tuple[Transform, Transform]:
    """Training and evaluation transform."""
    size = config.size
    resize = config.resize or round(size * 256 / 224)
    if config.augment == "xray":
        return (
            transform.xray_train(
                size, rotation=config.rotation, translate=config.translation, scale=tuple(config.zoom), flip=config.flip
            ),
            transform.xray_eval(size),
        )
    evaluation = transform.natural_eval(size, resize=resize)
    if config.augment == "crop":
        return transform.bit_train(resize, size, flip=config.flip), evaluation
    if config.augment == "none":
        return evaluation, evaluation
    return (
        transform.natural_train(
            size,
            scale=tuple(config.scale),
            flip=config.flip,
            randaugment=None if config.randaugment is None else tuple(config.randaugment),
        ),
        evaluation,
    )


def choose_device(wanted: str, comm: Communicator) -> torch.device:
    """This rank's device: the GPU of its local rank, or the CPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: no usable GPU is visible to this process; choose cpu, or check the job's GPUs")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Slurm can bind GPUs to tasks: then each sees its own alone, as number 0.
    bound = "SLURM_GPUS_PER_TASK" in os.environ or "SLURM_TRES_PER_TASK" in os.environ
    index = 0 if bound and count == 1 else comm.local_rank
    if index >= count:
        raise UserError(
            f"local rank {comm.local_rank} has no GPU: {count} visible on this node; start {count} tasks per node "
            "(--ntasks-per-node), or let each task see its own GPU (--gpus-per-task=1)"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def check_labels(pack: Pack, num_classes: int, what: str) -> None:
    """UserError unless the pack's labels fit a head of `num_classes` outputs."""
    if pack.labels.ndim == 2:
        if pack.labels.shape[1] != num_classes:
            found = pack.labels.shape[1]
            raise UserError(f"{what} pack {pack.path} has {found} labels per image, but the head {num_classes} outputs")
        return
    largest = int(pack.labels.max(initial=-1))
    if largest >= num_classes:
        raise UserError(
            f"{what} pack {pack.path} holds label {largest} ({len(pack.class_names)} classes), but the head has only "
            f"{num_classes} outputs; set model.num_classes={max(largest + 1, len(pack.class_names))} or leave it out"
        )


def same_classes(train: Pack, other: Pack) -> None:
    """UserError unless both packs number the same classes alike."""
    if list(train.class_names) != list(other.class_names) or train.labels.ndim != other.labels.ndim:
        only = sorted(set(other.class_names) ^ set(train.class_names))[:5]
        raise UserError(
            f"{other.path} does not have the classes of {train.path}: {len(other.class_names)} against "
            f"{len(train.class_names)}" + (f", differing in {', '.join(only)}" if only else ", in another order")
        )


def build_model(name: str, num_classes: int, seed: int) -> nn.Module:
    """A new network, random but for the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return bit.build(name, num_classes)


def read_weights(place: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and, where it is one of our checkpoints, its description; any format of engine/weights.py."""
    path = Path(place)
    if path.is_dir():
        folder = checkpoint.find(path)
        return weights.load(folder / checkpoint.WEIGHTS), checkpoint.describe(folder)
    return weights.load(path), {}


def build_optimizer(model: nn.Module, config: AgcSgdConfig, lr: float) -> AgcSgd:
    """AGC-SGD over the network's parameters, grouped by name: the head is not clipped."""
    return AgcSgd(
        named_groups(model, config.weight_decay, config.no_decay),
        lr=lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        clipping=config.clipping,
        eps=config.eps,
        implementation=config.implementation,
    )


def summary(name: str, parts: Parts, comm: Communicator, global_batch: int) -> str:
    """What is about to run, for people."""
    numel = sum(parameter.numel() for parameter in parts.flat.parameters)
    where = f"{comm.size} rank{'s' if comm.size > 1 else ''} ({comm.name})"
    return (
        f"{name}: {numel:,} parameters, {parts.about['num_classes']} classes, {parts.objective.name}; "
        f"{len(parts.train):,} images; batch {global_batch} over {where}; "
        f"{parts.precision.name} on {parts.device.type}; AGC-SGD {parts.optimizer.implementation}"
    )


def memory_use(device: torch.device) -> str:
    """Largest memory use of this process so far, for people."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU, {host:.2f} GiB on the host"
    return f"{host:.2f} GiB"
