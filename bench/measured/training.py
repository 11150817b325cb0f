"""The engine's own training step, with a stopwatch: what train_step.py and scaling.py time."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.comm.communicator import Communicator
from engine.network import bit
from engine.optim.agc_sgd import AgcSgd
from engine.optim.flat import FlatParameters
from engine.optim.gradients import GradientSum
from engine.optim.groups import named_groups
from engine.optim.standardized import choose
from engine.optim.tree import TreeSum
from engine.training import feed, objective
from engine.training.precision import Precision, prepare_device
from engine.training.trainer import Trainer
from loaders.errors import UserError
from loaders.packs import agree
from loaders.packs.shard import Pack
from loaders.pipelines import batches, transform
from loaders.pipelines.batches import Batch

PHASES = ("data", "forward", "backward", "exposed", "optimizer")


@dataclass(frozen=True)
class Setup:
    """What is trained, and how."""

    network: str
    batch: int  # images per step on each rank
    precision: str
    device: str  # auto, cpu, cuda
    size: int = 224
    num_classes: int = 1000
    slice_mib: float = 32.0
    learning_rate: float = 0.01
    channels_last: bool = True
    standardize: str = "auto"  # where weights are: optimizer or network
    implementation: str = "auto"  # of the optimizer: fused or foreach
    recompute: str = "none"  # see engine.network.recompute
    threads: int = 2  # decoding threads of a rank, for a pack
    seed: int = 0
    micro_batches: int = 1  # of a step on each rank
    reproducible: bool = False  # see engine.training.reproducible


class Stopwatch:
    """Lap times by name: of the host, or of the GPU by events, which do not make the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._last = self._now()
        self._laps: list[tuple[str, object, object]] = []
        self._steps = [self._last]

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """What passed since the last lap was `name`."""
        now = self._now()
        self._laps.append((name, self._last, now))
        self._last = now

    def end_step(self) -> None:
        """The last lap ended a step."""
        self._steps.append(self._last)

    def restart(self) -> None:
        """Forget all laps; time starts to count now."""
        self._laps.clear()
        self._last = self._now()
        self._steps = [self._last]

    def seconds(self) -> tuple[list[float], dict[str, float]]:
        """Each step's time, and all steps' time by lap name. Waits for the device."""
        if self._gpu:
            torch.cuda.synchronize()
        sums: dict[str, float] = defaultdict(float)
        for name, start, end in self._laps:
            sums[name] += self._between(start, end)
        pairs = zip(self._steps, self._steps[1:], strict=False)
        return [self._between(start, end) for start, end in pairs], dict(sums)

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._gpu else end - start


class TimedGradients(GradientSum):
    """Marks the end of the backward pass, and of the wait for what is then still under way."""

    watch: Stopwatch

    @contextmanager
    def during_backward(self, *, first: bool = True, last: bool = True) -> Iterator[None]:
        with super().during_backward(first=first, last=last):
            yield
            self.watch.lap("backward")
        self.watch.lap("exposed")


class TimedTree(TimedGradients, TreeSum):
    """The same of a sum in one tree."""


class TimedTrainer(Trainer):
    """A trainer whose steps are lapped; `losses` holds each step's mean loss on this rank, on the device."""

    def __init__(self, setup: Setup, model: torch.nn.Module, comm: Communicator, precision: Precision) -> None:
        flat = FlatParameters(model, channels_last=setup.channels_last)
        self.standardized = choose(model, flat, precision.compute_dtype, setup.standardize, setup.implementation)
        super().__init__(
            model=model,
            flat=flat,
            optimizer=AgcSgd(
                named_groups(model, 1e-4, "none"),
                lr=setup.learning_rate,
                momentum=0.9,
                nesterov=True,
                implementation=setup.implementation,
                forward_weights=None if self.standardized is None else self.standardized.forward_weights,
            ),
            batches=iter(()),
            objective=objective.choose(np.zeros(1, dtype=np.int64)),
            learning_rate=lambda step: setup.learning_rate,
            comm=comm,
            precision=precision,
            total_steps=0,
            global_batch=setup.batch * comm.size,
        )
        self.watch = Stopwatch(flat.values.device)
        # In place of the one that the trainer made, whose hooks must not be armed as well.
        how = flat, comm, int(setup.slice_mib * 2**20)
        leaves = setup.micro_batches * comm.size
        timed = TimedTree(*how, torch.float32, leaves) if setup.reproducible else TimedGradients(*how)
        self.gradients, timed.watch = timed, self.watch
        self.losses: list[torch.Tensor] = []

    def run(self, source: Iterator[Sequence[Batch]], steps: int) -> None:
        """Train `steps` steps on micro-batches from `source`."""
        self.model.train()
        for _ in range(steps):
            micro_batches = next(source)
            self.watch.lap("data")
            self.train_step(micro_batches)
            self.watch.lap("optimizer")
            self.watch.end_step()

    def _forward(self, batch: Batch) -> torch.Tensor:
        loss = super()._forward(batch)
        self.losses.append(loss.detach())
        self.watch.lap("forward")
        return loss


def build(setup: Setup, comm: Communicator) -> TimedTrainer:
    """A trainer of the set-up on this rank's device; all ranks get the same weights."""
    precision = prepare_device(setup.precision, setup.device, comm, reproducible=setup.reproducible)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        model = bit.build(setup.network, setup.num_classes, recompute=setup.recompute)
    trainer = TimedTrainer(setup, model.to(precision.device), comm, precision)
    comm.broadcast_(trainer.flat.values, "parameters")
    if trainer.standardized is not None:
        trainer.standardized.refresh()
    return trainer


def synthetic(setup: Setup, comm: Communicator, device: torch.device) -> Iterator[list[Batch]]:
    """The same random batch again and again: training without input."""
    first = comm.rank * setup.batch
    batch = images(range(first, first + setup.batch), setup, device)
    parts = [tensor.chunk(setup.micro_batches) for tensor in batch]
    micro_batches = [Batch(*fields) for fields in zip(*parts, strict=True)]
    while True:
        yield micro_batches


def images(numbers: range, setup: Setup, device: torch.device) -> Batch:
    """The random images of these numbers, each a function of its number alone; labels too."""
    shape = (3, setup.size, setup.size)
    pixels = [torch.randn(shape, generator=torch.Generator().manual_seed(number)) for number in numbers]
    labels = torch.tensor([number * 7919 % setup.num_classes for number in numbers])
    memory = torch.channels_last if setup.channels_last else torch.contiguous_format
    ids = torch.tensor(list(numbers))
    stacked = torch.stack(pixels).to(memory_format=memory)
    return Batch(
        stacked.to(device), labels.to(device), ids.to(device), torch.ones_like(ids, dtype=torch.bool).to(device)
    )


def from_pack(place: str, setup: Setup, comm: Communicator, device: torch.device) -> batches.Batches:
    """Batches of a pack, as in pre-training on natural images. UserError for labels that do not fit."""
    pack = Pack.open(place)
    if pack.labels.ndim != 1:
        raise UserError(f"{place} holds label vectors; the benchmarks take one class per image")
    agree.check_labels(pack, setup.num_classes)
    plan = feed.order(np.arange(len(pack)), setup.batch * comm.size, 1, setup.seed, comm)
    return batches.train_batches(
        pack, plan, transform.natural_train(setup.size), device=str(device), threads=setup.threads
    )


def agreement_loss(setup: Setup, comm: Communicator, global_batch: int, steps: int) -> list[float]:
    """Mean loss of each of `steps` steps on the same `global_batch` images, however many ranks share them."""
    trainer = build(setup, comm)
    share = global_batch // comm.size
    first = comm.rank * share
    parts = [
        images(range(begin, min(begin + setup.batch, first + share)), setup, trainer.flat.values.device)
        for begin in range(first, first + share, setup.batch)
    ]
    trainer.global_batch = trainer.labels_per_step = global_batch
    found = []
    for _ in range(steps):
        trainer.losses.clear()
        trainer.run(iter([parts]), 1)
        total = torch.stack(trainer.losses).sum().double().cpu().reshape(1)
        found.append(comm.sum_(total, "agreement").item())
    return found
