"""What can befall a run of several ranks on this machine, done to it from outside, at moments drawn from a seed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from engine.saving import checkpoint, places
from jobs.supervise import children
from loaders.lock import start_of

KINDS = {
    "kill_rank": "SIGKILL to one rank",
    "kill_job": "SIGKILL to all processes",
    "stop_rank": "SIGSTOP to one rank, which hangs",
    "usr1": "SIGUSR1 to one rank, as before a time limit",
    "disk_full": "the run's file system filled, and freed after a while",
    "damage": "SIGKILL to all, and a byte changed in the newest checkpoint",
}


@dataclass(frozen=True)
class Due:
    """A disturbance that is to come."""

    at_s: float  # from the start of the run
    kind: str


def schedule(seed: int, mean_s: float, kinds: list[str]) -> Iterator[Due]:
    """Without an end: waits drawn from an exponential distribution, kinds in rounds, each round in another order."""
    draw, at = random.Random(seed), 0.0
    while True:
        for kind in draw.sample(kinds, len(kinds)):
            at += draw.expovariate(1 / mean_s)
            yield Due(at, kind)


@dataclass
class Job:
    """A supervised run."""

    folder: Path
    filler: Path  # what fills the file system that the folder is on
    draw: random.Random
    full_s: float  # how long it stays full
    damaged: set[str] = field(default_factory=set)  # checkpoints

    def disturb(self, supervisor: int, kind: str) -> bool:
        """Do it to the processes below a supervisor. False where it cannot be now: not all ranks train, or there is no
        sound checkpoint but the newest."""
        ranks = self.training()
        if not ranks:
            return False
        one = self.draw.choice(ranks)
        if kind == "damage":
            return self._damage(supervisor)
        if kind == "disk_full":
            self._fill()
        elif kind == "kill_job":
            self._kill_all(supervisor)
        else:
            number = {"kill_rank": signal.SIGKILL, "stop_rank": signal.SIGSTOP, "usr1": signal.SIGUSR1}[kind]
            os.kill(one, number)
        return True

    def training(self) -> list[int]:
        """Processes of the ranks, once all of them live and train."""
        found = []
        for path in sorted((self.folder / "heartbeats").glob("rank-*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError):  # just being written
                sign = json.loads(path.read_bytes())
                alive = start_of(sign["pid"]) == sign["started"] is not None
                found += [sign["pid"]] if alive and sign["doing"].startswith("step ") else []
        return found if len(found) > 1 else []

    def _kill_all(self, supervisor: int) -> None:
        """All processes but the supervisor, also those that start meanwhile."""
        while left := descendants(supervisor):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def _fill(self) -> None:
        with open(self.filler, "wb", buffering=0) as file:
            for piece in (bytes(2**20), bytes(2**12), bytes(1)):
                try:
                    while True:
                        file.write(piece)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
        timer = threading.Timer(self.full_s, self.filler.unlink, kwargs={"missing_ok": True})
        timer.daemon = True
        timer.start()

    def _damage(self, supervisor: int) -> bool:
        if len(self._sound()) < 2:
            return False
        os.kill(supervisor, signal.SIGSTOP)  # it starts nothing before the damage is done
        try:
            self._kill_all(supervisor)
            newest = self._sound()[-1]
            path = newest / checkpoint.WEIGHTS
            with open(path, "r+b") as file:
                file.seek(path.stat().st_size // 2)
                (byte,) = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
            self.damaged.add(newest.name)
        finally:
            os.kill(supervisor, signal.SIGCONT)
        return True

    def _sound(self) -> list[Path]:
        return [path for path in places.complete(self.folder / "checkpoints") if path.name not in self.damaged]


def descendants(parent: int) -> list[int]:
    """The living processes below `parent`, itself not among them."""
    found, todo = [], [parent]
    while todo:
        below = children(todo.pop(), living=True)
        found += below
        todo += below
    return found
