"""Which micro-batch is fastest: of those that have room, by counting, each is tried on the network that is to train."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from torch import nn

from engine.comm.communicator import Communicator
from engine.network import family
from engine.network.memory import saved_bytes, saved_bytes_per_image
from engine.optim.flat import FlatParameters
from engine.tuning.room import available_bytes
from loaders.errors import UserError

BUDGET_S = 40.0
_SPACING = 1.4  # of the sizes that are tried
_ROOM = 0.7  # share of the free memory that may be counted on
_BESIDE = 1.3  # what a pass needs at its peak: what it keeps, and gradients on their way
_TURNS = 9
_BEHIND = 0.9  # of the best rate: those that fall behind are tried no more
_SAMPLE = 4  # turns, before any falls behind


class Precision(Protocol):
    """`engine.training.precision`."""

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def compute_dtype(self) -> torch.dtype: ...
    def autocast(self) -> AbstractContextManager: ...


class Parts(Protocol):
    """Of a run: `engine.training.assemble`."""

    @property
    def network(self) -> str: ...
    @property
    def recompute(self) -> str: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def flat(self) -> FlatParameters: ...
    @property
    def objective(self) -> Any: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def feed(self) -> Any: ...


def sizes(global_batch: int, ranks: int) -> list[int]:
    """Micro-batches that share a global batch out among the ranks, one for each at least; of many, some apart."""
    if global_batch < ranks:
        raise UserError(f"a global batch of {global_batch} has no image for some of {ranks} ranks; take a larger one")
    most = global_batch // ranks
    fitting = [size for size in range(1, most + 1) if global_batch % size == 0]
    kept = [fitting[-1]]
    for size in reversed(fitting):
        if size * _SPACING <= kept[-1]:
            kept.append(size)
    return kept[::-1]


def fastest(parts: Parts, comm: Communicator, budget_s: float = BUDGET_S) -> tuple[int, str]:
    """The micro-batch with which a step is shortest on the slowest rank, and what was seen, for people.

    All ranks call it together, and try each size at the same time, as in training; none talks while it computes. It
    ends a while after `budget_s`. Weights stay as they are. UserError where not even one image has room.
    """
    device, plan = parts.precision.device, parts.feed.plan
    candidates = sizes(plan.global_batch, comm.size)
    room = min(comm.exchange(available_bytes(device, comm)))
    images = 4 * 3 * parts.feed.train_transform.size**2 * (parts.feed.config.prefetch + 2)  # on their way
    with _as_before(parts):
        each = _BESIDE * _kept(parts) + images
        fit = [size for size in candidates if size * each <= _ROOM * room] or candidates[:1]
        trial = Trial(parts, comm)
        taken = search(fit, trial.seconds, budget_s, trial.clock)
    if not taken:
        needed, free = each * fit[0] / 2**30, room / 2**30
        raise UserError(
            f"a micro-batch of {fit[0]} finds no memory: it needs {needed:,.2f} GiB, and {free:,.2f} are free; take "
            "more memory, or model.recompute=unit"
        )
    step = {size: math.ceil(plan.global_batch / size / comm.size) * seconds for size, seconds in taken.items()}
    best = min(step, key=lambda size: step[size])
    rates = ", ".join(f"{size}: {plan.global_batch / step[size]:,.1f}" for size in taken)
    beyond = "" if len(fit) == len(candidates) else f"; {_ROOM:.0%} of what is free has room for {fit[-1]}"
    return best, f"micro-batch {best}, the fastest of those tried (images/s by size: {rates}{beyond})"


def search(
    candidates: Sequence[int], seconds: Callable[[int, int], float], budget_s: float, clock: Callable[[], float]
) -> dict[int, float]:
    """Median seconds of a pass for each of the sizes that were tried and had room.

    seconds: of size and number of passes, the mean of a pass on the slowest rank; infinite for want of memory. What it
    says, and what `clock` does, is the same on all ranks, and so is each decision here.
    """
    taken: dict[int, list[float]] = {}
    begun = clock()
    for size in candidates:
        expected = min((times[0] / each for each, times in taken.items()), default=0.0) * size
        if taken and 2 * expected > budget_s - (clock() - begun):
            break
        first = seconds(size, 1)  # memory is found, algorithms are chosen
        if not math.isfinite(first):
            break  # larger ones have no room either
        taken[size] = [seconds(size, 1)]
    alive = list(taken)
    for turn in range(_TURNS - 1):
        alive = [size for size in alive if math.isfinite(taken[size][-1])]
        for size in alive:
            if clock() - begun > budget_s:
                break
            passes = round(taken[alive[-1]][-1] / taken[size][-1])  # each size for about as long
            taken[size].append(seconds(size, max(1, passes)))
        if turn >= _SAMPLE - 2:
            rates = {size: size / statistics.median(taken[size]) for size in alive}
            alive = [size for size in alive if rates[size] >= _BEHIND * max(rates.values())]
    return {size: statistics.median(times) for size, times in taken.items() if all(map(math.isfinite, times))}


class Trial:
    """Forward and backward passes on images of noise."""

    def __init__(self, parts: Parts, comm: Communicator) -> None:
        self._parts, self._comm = parts, comm
        self._elapsed = 0.0

    def clock(self) -> float:
        """Seconds of all trials so far, the same on all ranks."""
        return self._elapsed

    def seconds(self, size: int, passes: int) -> float:
        """Of a pass, on the slowest rank; infinite where one has no memory for it."""
        taken, start = math.inf, time.perf_counter()
        try:
            taken = self._passes(size, passes)
        except (RuntimeError, MemoryError) as error:
            if not (isinstance(error, MemoryError) or any(word in str(error).lower() for word in ("memory", "alloc"))):
                raise
        self._parts.flat.detach()
        if self._parts.precision.device.type == "cuda":
            torch.cuda.empty_cache()
        said = self._comm.exchange((taken, time.perf_counter() - start))
        self._elapsed += max(elapsed for _, elapsed in said)
        return max(taken for taken, _ in said)

    def _passes(self, size: int, passes: int) -> float:
        feed, precision = self._parts.feed, self._parts.precision
        side = feed.train_transform.size
        images = torch.randn(size, 3, side, side, device=precision.device).to(memory_format=torch.channels_last)
        labels = torch.from_numpy(feed.train.labels[np.resize(feed.plan.pool, size)]).to(precision.device)
        self._wait()
        start = time.perf_counter()
        for _ in range(passes):
            with precision.autocast():
                logits = self._parts.model(images)
            total, _ = self._parts.objective.loss(logits.float(), labels)
            (total / size).backward()
            self._parts.flat.detach()
        self._wait()
        return (time.perf_counter() - start) / passes

    def _wait(self) -> None:
        if self._parts.precision.device.type == "cuda":
            torch.cuda.synchronize(self._parts.precision.device)


@contextmanager
def _as_before(parts: Parts) -> Iterator[None]:
    """What the passes change is put back: gradients, running statistics, the state of dropout."""
    buffers = [(buffer, buffer.clone()) for buffer in parts.model.buffers()]
    devices = [parts.precision.device] if parts.precision.device.type == "cuda" else []
    parts.flat.detach()
    parts.model.train()
    with torch.random.fork_rng(devices=devices):
        yield
    for buffer, before in buffers:
        buffer.copy_(before)
    parts.flat.attach()


def _kept(parts: Parts) -> int:
    """Bytes of an image that a forward pass keeps for the backward pass."""
    size = parts.feed.train_transform.size
    if not family.is_timm(parts.network):
        return saved_bytes_per_image(parts.network, size, parts.precision.compute_dtype, parts.recompute)
    own = frozenset(parameter.untyped_storage()._cdata for parameter in parts.model.parameters())
    counts = []
    for batch in (1, 2):
        images = torch.zeros(batch, 3, size, size, device=parts.precision.device)
        with parts.precision.autocast():
            counts.append(saved_bytes(partial(parts.model, images), beside=own))
    return counts[1] - counts[0]


def settled(parts: Parts, folder: Path | None, keys: Sequence[str], comm: Communicator) -> int:
    """The micro-batch of a run: that of its earlier start, else the fastest. Rank 0 says which; all ranks call it.

    folder: of the run; keys: of the micro-batch in its configuration.
    """
    size = _earlier(folder, keys, comm)
    if size in sizes(parts.feed.plan.global_batch, comm.size):
        said = f"micro-batch {size}, as when this run was started"
    else:
        size, said = fastest(parts, comm)
    if comm.leads:
        print(said, flush=True)
    return size


def _earlier(folder: Path | None, keys: Sequence[str], comm: Communicator) -> int:
    """What the configuration in `folder` says, on all ranks; 0 where there is none, or it does not help."""
    size = 0
    if folder is not None and comm.leads:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
            found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            for key in keys:
                found = found[key]
            size = int(found)
    return comm.exchange(size)[0]
