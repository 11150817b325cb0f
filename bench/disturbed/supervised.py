"""A run below `jobs/supervise.py` on this machine: left alone, or disturbed as a schedule says; in turns."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.disturbed.disturb import Due, Job
from bench.measured.timing import commit
from jobs.supervise import DONE, STOPPED
from loaders.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
_WARM = "torch.utils.tensorboard,matplotlib.figure,engine.training.run,engine.comm.torch_distributed"
_SAYS_S = 15.0  # between two words on how far it is


def environment() -> dict[str, str]:
    """Both runs get the same threads, or their sums would differ; no start asks git for the commit."""
    threads = max(1, len(os.sched_getaffinity(0)) // RANKS)
    return os.environ | {"OMP_NUM_THREADS": str(threads), "BOOSTERBIT_COMMIT": commit()}


def step_of(folder: Path) -> int:
    """The newest logged step."""
    found = 0
    with contextlib.suppress(OSError):  # not there yet
        for line in (folder / "metrics.jsonl").read_bytes().splitlines()[-8:]:
            with contextlib.suppress(ValueError):  # just being written
                found = max(found, json.loads(line)["step"])
    return found


@dataclass
class Run:
    """A supervised run, and what befalls it."""

    name: str
    command: list[str]
    folder: Path
    steps: int
    batch: int  # images a step
    job: Job | None = None
    due: Iterator[Due] = iter(())
    seconds: float = 0.0  # of all turns, until the supervisor had ended
    starts: int = 0
    done: list[dict[str, Any]] = field(default_factory=list)  # disturbances
    turns: list[tuple[int, float]] = field(default_factory=list)  # the newest logged step, and seconds
    _coming: Due | None = None
    _before: set[int] = field(default_factory=set)  # ranks that were there when something befell them

    def go_on(self, until: int, log: Path) -> None:
        """From where it is to step `until` and a little further, where it is stopped in good order, or to its end.
        UserError where the supervisor gave up."""
        words = [sys.executable, "-m", "jobs.supervise", "--folder", str(self.folder), "--wait", "1", "--silent", "60",
                 "--warm", _WARM, "--", sys.executable, *self.command]  # fmt: skip
        with open(log, "w+b") as output:
            start = told = time.monotonic()
            process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=output, stderr=output)
            stopped = False
            try:
                while process.poll() is None:
                    now = self.seconds + time.monotonic() - start
                    if not stopped:
                        self._befall(process.pid, now)
                    if until < self.steps and not stopped and self._calm() and step_of(self.folder) >= until:
                        process.send_signal(signal.SIGUSR1)
                        stopped = True
                    if time.monotonic() - told > _SAYS_S:
                        told, step = time.monotonic(), step_of(self.folder)
                        left = f"{now / step * (self.steps - step):.0f} s left" if step else "it starts"
                        said = f"step {step} of {self.steps}, {step * self.batch / now:.0f} images/s, {left}"
                        print(f"{self.name}: {now:.0f} s, {said}", flush=True)
                    time.sleep(0.05)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            taken = time.monotonic() - start
            output.seek(0)
            said = output.read().decode(errors="replace")
        if process.returncode not in ((STOPPED, DONE) if stopped else (DONE,)):
            raise UserError(f"the {self.name} run was given up with code {process.returncode}:\n{said[-3000:]}")
        self.seconds += taken
        self.turns.append((step_of(self.folder), taken))
        self.starts += len(re.findall(r"supervise .*: start \d+, from", said))

    def _calm(self) -> bool:
        """Whether it can be stopped in good order."""
        return not self._before and not (self.job and self.job.filler.exists())

    def _befall(self, supervisor: int, now: float) -> None:
        """See whether all ranks are back from the last disturbance; do the next one, where it is due."""
        if not self.job:
            return
        if self._before and (there := self.job.training()) and self._before.isdisjoint(there):
            self.done[-1]["back_after_s"], self._before = round(now - self.done[-1]["at_s"], 1), set()
        self._coming = self._coming or next(self.due, None)
        if self._coming and now >= self._coming.at_s:
            there = self.job.training()
            if self.job.disturb(supervisor, self._coming.kind):
                self.done.append({"at_s": round(now, 1), "kind": self._coming.kind, "step": step_of(self.folder)})
                print(f"{self.name}: {now:.1f} s, step {self.done[-1]['step']}: {self._coming.kind}", flush=True)
                self._coming = None
                self._before = set() if self.done[-1]["kind"] == "disk_full" else set(there)
