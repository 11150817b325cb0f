"""One rank of the trials that bench/lagging.py launches: short runs, one rank of each slowed in one way, or none."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.comm.choose import connect
from engine.comm.communicator import Communicator, Handle
from engine.monitoring.progress import Progress
from engine.monitoring.ranks import RankTimes, setting
from engine.optim.agc_sgd import AgcSgd
from engine.optim.flat import FlatParameters
from engine.training import hooks, objective
from engine.training.precision import Precision
from engine.training.trainer import Hook, Trainer
from loaders.output import as_command
from loaders.pipelines.batches import Batch

MARK = "boosterbit-lagging "  # what the line of JSON begins with
KINDS = ("input", "compute", "link", "none")
_SIDE, _BATCH = 8, 1
READING = 0.06  # share of an undisturbed step that every rank reads for
NOISE = 0.03  # standard deviation of what every rank sleeps, share of it


class Link(Communicator):
    """What this rank tells the others, and hears from them, goes through a link that takes `seconds_per_byte` more.

    Behind the back of the rank, which goes on computing; in the order in which it was asked for.
    """

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner.launch)
        self.name, self.seconds_per_byte, self._inner = inner.name, 0.0, inner
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="link")

    def _through(self, size: int, call: Any) -> Future:
        def later() -> Any:
            time.sleep(size * self.seconds_per_byte)
            return call()

        return self._thread.submit(later)

    def start_sum_(self, tensor: torch.Tensor, name: str) -> Handle:
        return _Under(self._through(tensor.nbytes, lambda: self._inner.start_sum_(tensor, name).wait()))

    def broadcast_(self, tensor: torch.Tensor, name: str = "broadcast", root: int = 0) -> None:
        self._through(tensor.nbytes, lambda: self._inner.broadcast_(tensor, name, root)).result()

    def gather(self, array: np.ndarray, name: str = "gather") -> np.ndarray:
        return self._through(array.nbytes, lambda: self._inner.gather(array, name)).result()

    def exchange(self, value: Any) -> list[Any]:
        return self._through(0, lambda: self._inner.exchange(value)).result()


class _Under:
    def __init__(self, future: Future) -> None:
        self._future = future

    def wait(self) -> object:
        return self._future.result()


class Slept(nn.Module):
    """A network that takes about `seconds` longer for its forward pass than it computes."""

    def __init__(self, network: nn.Module, seconds: float, random: np.random.Generator) -> None:
        super().__init__()
        self.network, self._seconds, self._random = network, seconds, random

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        _sleep(self._seconds, self._random)
        return self.network(images)


def _sleep(seconds: float, random: np.random.Generator) -> None:
    time.sleep(max(0.0, random.normal(seconds, NOISE * seconds)))


def reader(seconds: float, random: np.random.Generator) -> Iterator[list[Batch]]:
    """Batches, each read in about `seconds`."""
    images = torch.zeros(_BATCH, 3, _SIDE, _SIDE)
    labels, ids = torch.zeros(_BATCH, dtype=torch.int64), torch.arange(_BATCH)
    while True:
        _sleep(seconds, random)
        yield [Batch(images, labels, ids, torch.ones(_BATCH, dtype=torch.bool))]


class Clocked:
    """Calls of an object's methods, and how long they took in all."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, target: Any, *names: str) -> None:
        for name in names:
            setattr(target, name, self._clocked(getattr(target, name)))

    def _clocked(self, call: Any) -> Any:
        def clocked(*given: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*given)
            finally:
                self.seconds += time.perf_counter() - start

        return clocked


def trial(
    comm: Link, kind: str, slow: int, seed: int, *, step_s: float, slower: float, steps: int, every: int
) -> dict[str, Any]:
    """A run in which rank `slow` is slowed by `slower` of a step of `step_s` in `kind`: whom it named at which step,
    why, and what watching took of its time on this rank."""
    random = np.random.default_rng([seed, comm.rank])
    mine = kind if comm.rank == slow else "none"
    more = slower * step_s
    reading = READING * step_s + (more if mine == "input" else 0.0)
    computing = (1 - READING) * step_s + (more if mine == "compute" else 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Slept(nn.Sequential(nn.Flatten(), nn.Linear(3 * _SIDE**2, 2)), computing, random)
    flat = FlatParameters(model, channels_last=True)
    said: list[str] = []
    progress = Progress(0, steps, comm.size * _BATCH, False)
    known = setting(comm, torch.device("cpu"), threads=1, keys="train.", images=_BATCH, network="one layer", size=_SIDE,
                    dtype="float32", recompute="none")  # fmt: skip
    times = RankTimes(known, comm, 0, None, flat.grads, launching=0.0, say=said.append)
    seen: list[tuple[int, int, str]] = []

    class Names:
        """Notes who is named after each step."""

        def after_step(self, trainer: Trainer) -> None:
            late = times.lagging.named
            if late and (not seen or seen[-1][1:] != (late.rank, late.reason)):
                seen.append((trainer.step, late.rank, late.reason))

        def finish(self, trainer: Trainer) -> None:
            """Nothing left to do."""

    acts: list[Hook] = [hooks.Log(every, progress, None, 100.0), times, Names()]
    trainer = Trainer(
        model=model, flat=flat, optimizer=AgcSgd(model.parameters(), lr=0.0, implementation="foreach"),
        batches=reader(reading, random), objective=objective.choose(np.zeros(1, dtype=np.int64)),
        learning_rate=lambda step: 0.0, comm=comm, precision=Precision("fp32", torch.device("cpu")), total_steps=steps,
        global_batch=comm.size * _BATCH, hooks=acts,
    )  # fmt: skip
    clocked = Clocked()
    clocked.around(trainer.phases, "start", "lap", "end_step")
    clocked.around(times, "after_step")
    # What else is summed travels in the same message.
    comm.seconds_per_byte = more / flat.grads_and_sums.nbytes if mine == "link" else 0.0
    start = time.perf_counter()
    trainer.fit()
    taken = time.perf_counter() - start
    comm.seconds_per_byte = 0.0
    return {"named": seen, "watching": clocked.seconds / taken, "step_s": taken / steps}


def work(task: dict[str, Any], comm: Link) -> dict[str, Any]:
    """All trials, in an order that a seed gives, and a longer undisturbed run that says what watching costs."""
    random = np.random.default_rng(task["seed"])
    kinds = random.permutation([kind for kind in KINDS for _ in range(task["trials"])]).tolist()
    how = {"step_s": task["step_s"], "slower": task["slower"]}
    trial(comm, "none", 0, 0, steps=task["every"], every=task["every"], **how)  # threads, connections
    rows = []
    for number, kind in enumerate(kinds):
        slow = int(random.integers(comm.size))
        found = trial(comm, kind, slow, number, steps=task["steps"], every=task["every"], **how)
        rows.append({"kind": kind, "slow": None if kind == "none" else slow, **found})
        if comm.leads:
            wanted = [] if kind == "none" else [(slow, kind)]
            right = [tuple(each[1:]) for each in found["named"]] == wanted
            said = "right" if right else found["named"]
            print(f"{number + 1}/{len(kinds)} {kind}: {said}", file=sys.stderr, flush=True)
    long = trial(comm, "none", 0, len(kinds), steps=task["long"], every=task["long_every"], **how)
    return {"trials": rows, "watching": comm.exchange(long["watching"]), "long_step_s": long["step_s"]}


def main() -> None:
    """The command line: one argument, the task as JSON."""
    torch.set_num_threads(1)
    inner = connect("torch")
    result = work(json.loads(sys.argv[1]), Link(inner))
    if inner.leads:
        print(MARK + json.dumps(result), flush=True)
    inner.close()


if __name__ == "__main__":
    as_command(main)
