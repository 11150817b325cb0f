"""Where each rank's time goes: sent at each logged step and there a step later, kept in RUN/timing.jsonl, and judged.

{"kind": "run", "step": 0, "hosts": […], "device": "cpu", "threads": 2, …}     how it ran, once for each start
{"kind": "ranks", "step": 50, "steps": 50, "input": […], "compute": […], …}    seconds a step, of each rank
{"kind": "lagging", "step": 200, "rank": 3, "reason": "input", "share": 0.2}   named; rank null: nobody any more
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine.comm.communicator import Communicator, Handle
from engine.monitoring import diagnosis, lagging
from engine.monitoring.diagnosis import COLUMNS, Facts
from engine.monitoring.gpu import Gpu
from engine.monitoring.stopwatch import PHASES, USUAL, Stopwatch, copied_bytes_per_second
from engine.whole import json_text, may_wait, mend_last_line
from loaders.errors import UserError, told

FILE = "timing.jsonl"
_ROW = ("steps", *COLUMNS, *USUAL)
_DENSE = 200  # lines; the n-th comes after n / so many intervals, so that a long run of many ranks fills no disk

Table = dict[str, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """What the figures of a run are judged by, as its file keeps it."""

    hosts: Sequence[str]  # of each rank
    device: str
    threads: int  # decoding, of each rank
    cores: float  # of each rank
    copied_bytes_per_s: float  # by the memory of the slowest rank's device
    keys: str  # before the names of settings
    images: int  # a step, of a rank
    network: str
    size: int  # pixels
    dtype: str  # of the forward pass
    recompute: str

    def facts(self, moved_bytes: float = math.nan, link: int | None = None) -> Facts:
        """What a diagnosis needs of it; moved_bytes: that the passes read and write for an image."""
        moving = moved_bytes * self.images / self.copied_bytes_per_s
        return Facts(self.hosts, self.device, self.threads, self.cores, self.keys, moving, link)


def setting(comm: Communicator, device: torch.device, **known: Any) -> Setting:
    """The same on all ranks, which call it together; `known`: what else a `Setting` has."""
    host = socket.gethostname().partition(".")[0]
    found = comm.exchange((host, len(os.sched_getaffinity(0)), copied_bytes_per_second(device)))
    hosts = [each for each, _, _ in found]
    ranks = Counter(hosts)
    cores = min(cores / ranks[each] for each, cores, _ in found)
    return Setting(hosts, device.type, cores=cores, copied_bytes_per_s=min(copied for *_, copied in found), **known)


class _Trainer(Protocol):
    """What is asked of a trainer."""

    step: int
    global_batch: int
    phases: Stopwatch
    meter: Any


class RankTimes:
    """A hook: sends whenever the meter was read, since then the device has been waited for; writes and judges a step
    later, or at the end.

    gradients: the buffer that travels in each step. launching: seconds that this rank needs to start a step's
    operations, NaN where it is ahead of its device. moved_bytes: what they read and write for an image, counted when it
    is needed. say: a line for people.
    """

    def __init__(
        self,
        known: Setting,
        comm: Communicator,
        step: int,
        folder: Path | None,
        gradients: torch.Tensor,
        *,
        launching: float,
        say: Callable[[str], object],
        moved_bytes: Callable[[], float] | None = None,
    ) -> None:
        self._known, self._comm, self._say, self._moved = known, comm, say, moved_bytes
        self._launching, numel = launching, min(gradients.numel(), lagging.PROBE_NUMEL)
        self._message = gradients.new_zeros(numel) if comm.size > 2 else None
        self._messages_per_step = gradients.numel() / numel
        self._gpu, self.lagging = Gpu(gradients.device), lagging.Lagging(known.hosts)
        self._read: object = None
        self._travels: tuple[int, torch.Tensor, Handle] | None = None  # of which step; all ranks' rows, once they came
        self._intervals: list[np.ndarray] = []  # the first one; the sum of the others
        self._pending, self._waits, self._written = np.zeros((comm.size, len(_ROW))), 0, 0
        self._path, self._lines = None if folder is None or not comm.leads else folder / FILE, b""
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a+b") as file:
                mend_last_line(file)
        self._write({"kind": "run", "step": step, **asdict(known)})

    @property
    def table(self) -> Table | None:
        """Means of the steps so far, but of the first interval, in which buffers are made, and of what has not come
        yet: each of `diagnosis.COLUMNS`, (ranks,). Of the first one where there is no other; None before."""
        return _means(self._intervals[-1]) if self._intervals else None

    def after_step(self, trainer: _Trainer) -> None:
        self._receive()
        if trainer.meter.newest is self._read:
            return
        self._read = trainer.meter.newest
        self._send(trainer.phases, trainer.step, trainer.global_batch / trainer.meter.newest["images_per_second"])

    def finish(self, trainer: _Trainer) -> None:
        self._receive()
        if self.table is None or not self._comm.leads:
            return
        moved = self._moved() if self._moved and self._known.device == "cuda" else math.nan
        late = self.lagging.named
        link = late.rank if late and late.reason == "link" else None
        self._say(diagnosis.report(self.table, self._known.facts(moved, link)))

    def _send(self, watch: Stopwatch, step: int, step_seconds: float) -> None:
        """This rank's figures to all, which takes place while the next step runs: nobody waits for anybody here."""
        mine = watch.read() | self._gpu.figures() | {"launching": self._launching}
        mine["other"] = max(0.0, step_seconds - sum(mine[name] for name in PHASES))
        rows = torch.zeros(self._comm.size, len(_ROW), dtype=torch.float64)
        rows[self._comm.rank] = torch.tensor([mine[name] for name in _ROW], dtype=torch.float64)
        self._travels = step, rows, self._comm.start_sum_(rows.view(-1), "timing")

    def _receive(self) -> None:
        if self._travels is None:
            return
        step, sent, handle = self._travels
        self._travels = None
        handle.wait()
        rows = sent.numpy()
        if not rows[:, 0].min() > 0:
            return
        weighted = np.hstack([rows[:, :1], rows[:, 1:] * rows[:, :1]])
        if not self._intervals:
            self._intervals = [weighted]
            return
        self._intervals = [self._intervals[0], sum(self._intervals[1:]) + weighted]
        self._judge(rows[:, -len(USUAL) :].T, step, float(rows[0, 0]))
        self._keep(weighted, step)

    def _judge(self, usual: np.ndarray, step: int, steps: float) -> None:
        reading, computing, wait = usual
        before, probed = self.lagging.named, None
        if self.lagging.wants_probe(reading + computing, wait, steps) and self._message is not None:
            probed = lagging.probe(self._comm, self._message)
        phases = {"input": reading, "compute": computing}
        late = self.lagging.see(phases, wait, probed, self._messages_per_step)
        if (late and (late.rank, late.reason)) == (before and (before.rank, before.reason)):
            return
        self._write({"kind": "lagging", "step": step} | (asdict(late) if late else {"rank": None}))
        if late:
            self._say(f"step {step}: {lagging.in_words(late, self._known.hosts[late.rank])}")
        elif before:
            self._say(f"step {step}: rank {before.rank} lags no more")

    def _keep(self, weighted: np.ndarray, step: int) -> None:
        self._pending, self._waits = self._pending + weighted, self._waits + 1
        if self._waits * _DENSE < self._written:
            return
        means = {name: [_short(value) for value in values.tolist()] for name, values in _means(self._pending).items()}
        self._write({"kind": "ranks", "step": step, "steps": int(self._pending[0, 0]), **means})
        self._pending, self._waits, self._written = np.zeros_like(weighted), 0, self._written + 1

    def _write(self, line: dict[str, Any]) -> None:
        if self._path is None:
            return
        self._lines += json_text(line).encode() + b"\n"
        with (
            may_wait(self._path, "training goes on, and writes it with the next interval"),
            open(self._path, "ab", buffering=0) as file,
        ):
            while self._lines:
                self._lines = self._lines[file.write(self._lines) :]


def _means(weighted: np.ndarray) -> Table:
    return {name: weighted[:, 1 + index] / weighted[:, 0] for index, name in enumerate(COLUMNS)}


def _short(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.4g}")


@dataclass(frozen=True)
class Timing:
    """What a run's file says of its last start."""

    known: Setting
    table: Table  # means of its steps
    events: list[dict[str, Any]]  # that a rank lags, or none any more

    @property
    def link(self) -> int | None:
        """The rank whose link is named, if one is."""
        last = self.events[-1] if self.events else {}
        return last["rank"] if last.get("reason") == "link" else None

    @property
    def named(self) -> list[str]:
        """A line for people for each of the events."""
        lines = []
        for event in self.events:
            said, rank = "none lags any more", event["rank"]
            if rank is not None:
                late = lagging.Late(rank, event["reason"], event["share"])
                said = lagging.in_words(late, self.known.hosts[rank])
            lines.append(f"step {event['step']}: {said}")
        return lines


def read(path: Path) -> Timing:
    """What a timing.jsonl says of the last start that logged. Lines that are none, such as one that a killed run was
    writing, are passed over.

    UserError where none says where the time went.
    """
    with told(f"{path} cannot be read"):
        lines = path.read_bytes().splitlines()
    known: Setting | None = None
    rows: list[np.ndarray] = []
    events: list[dict[str, Any]] = []
    before = known, rows, events
    for line in lines:
        try:
            event = json.loads(line)
            if event["kind"] == "run":
                before = (known, rows, events) if rows else before
                known, rows, events = _setting(event), [], []
            elif event["kind"] == "ranks" and known:
                columns = np.array([event[name] for name in COLUMNS], dtype=np.float64)
                steps = np.full(len(known.hosts), float(event["steps"]))
                rows.append(np.vstack([steps, columns * steps]).T)
            elif event["kind"] == "lagging" and known:
                events.append(_named(event, len(known.hosts)))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    if not rows:  # started again when its work was done
        known, rows, events = before
    if known is None or not rows:
        raise UserError(f"{path} does not say where the time went; expected that of a run that logged twice or more")
    return Timing(known, _means(np.sum(rows, axis=0)), events)


def _named(event: dict[str, Any], ranks: int) -> dict[str, Any]:
    rank = event["rank"]
    if type(event["step"]) is not int or (rank is not None and not (type(rank) is int and 0 <= rank < ranks)):
        raise ValueError("not as it was written")
    if rank is None:
        return {"step": event["step"], "rank": None}
    if event["reason"] not in lagging.REASONS:
        raise ValueError("not as it was written")
    return {"step": event["step"], "rank": rank, "reason": event["reason"], "share": float(event["share"])}


def _setting(event: dict[str, Any]) -> Setting:
    found = {name: event[name] for name in Setting.__dataclass_fields__}
    whole = [found[name] for name in ("threads", "images", "size")]
    if not all(isinstance(host, str) for host in found["hosts"]) or not all(type(one) is int for one in whole):
        raise ValueError("not as it was written")
    return Setting(**found | {"cores": float(found["cores"]), "copied_bytes_per_s": float(found["copied_bytes_per_s"])})
