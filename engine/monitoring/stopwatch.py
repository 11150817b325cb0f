"""How long the phases of a step take on this rank: by the host's clock, or by events of a GPU that nobody waits for."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import numpy as np
import torch

PHASES = ("input", "compute", "wait", "optimizer")
"""What a step consists of: until the batch is there; forward and backward; until the other ranks' gradients are there;
the optimizer."""
USUAL = ("usual_input", "usual_compute", "usual_wait")


class Stopwatch:
    """Sums up the phases of the steps since it was last read.

    On a GPU a phase is the time between two events in the stream: input that the host waited for while the device was
    busy does not count. Events are read a step late or later, when the device has passed them.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # of the step under way: a phase and when it ended
        self._later: deque[list[tuple[str, Any]]] = deque()  # steps that the device has not passed yet
        self._busy = 0.0  # this process's seconds of CPU when the step began
        self._reset()

    def _reset(self) -> None:
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._steps = self._issued = self._ahead = 0
        self._decoding = 0.0
        self._each: list[list[float]] = []  # step: seconds of input, computing, waiting

    def start(self) -> None:
        """A step begins: what follows is its input."""
        self._marks = [("", self._now())]
        self._busy = time.process_time()

    def lap(self, phase: str) -> None:
        """What passed since the last lap was `phase`. Nothing where no step was started, as in a dry run."""
        if not self._marks or (self._gpu and torch.cuda.is_current_stream_capturing()):
            return
        self._marks.append((phase, self._now()))
        if phase == "input":
            self._decoding += time.process_time() - self._busy

    def end_step(self) -> None:
        """The step is issued. What no phase has named, such as a CUDA graph, is computing."""
        if not self._marks:
            return
        marks, self._marks = [*self._marks, ("compute", self._now())], []
        self._issued += 1
        if not self._gpu:
            self._add(marks)
            return
        self._read_passed()
        self._ahead += not next(event for phase, event in marks if phase == "compute").query()
        self._later.append(marks)

    def read(self) -> dict[str, float]:
        """Means of the steps since the last reading, then start anew: seconds a step of each phase; `steps`, how many;
        `decoding`, seconds that this process's threads computed while it waited for input; `ahead`, the share of steps
        that were issued before the device had done their backward pass, NaN on a CPU; `usual_input`, `usual_compute`
        (with the optimizer), `usual_wait`, of the middle half of the steps. NaN where there were no steps."""
        self._read_passed()
        steps, issued = self._steps or math.nan, self._issued or math.nan
        found = {phase: total / steps for phase, total in self._sums.items()}
        found |= {"steps": self._steps, "decoding": self._decoding / issued}
        found["ahead"] = self._ahead / issued if self._gpu else math.nan
        found |= dict(zip(USUAL, _middle(self._each), strict=True))
        self._reset()
        return found

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read_passed(self) -> None:
        while self._later and self._later[0][-1][1].query():
            self._add(self._later.popleft())

    def _add(self, marks: list[tuple[str, Any]]) -> None:
        each = dict.fromkeys(PHASES, 0.0)
        for (_, start), (phase, end) in zip(marks, marks[1:], strict=False):
            each[phase] += start.elapsed_time(end) / 1e3 if self._gpu else end - start
        for phase, seconds in each.items():
            self._sums[phase] += seconds
        self._each.append([each["input"], each["compute"] + each["optimizer"], each["wait"]])
        self._steps += 1


def _middle(each: list[list[float]]) -> list[float]:
    """Means of the middle half of each column: hiccups of the machine are not in it."""
    if not each:
        return [math.nan] * len(USUAL)
    ordered, cut = np.sort(np.array(each), axis=0), len(each) // 4
    return ordered[cut : len(each) - cut].mean(axis=0).tolist()


def copied_bytes_per_second(device: torch.device, size: int = 2**25) -> float:
    """What the memory of `device` gives and takes: bytes read and written in a copy of `size` bytes. Waits for it."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, taken = torch.empty_like(source), []
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return 2 * size / min(taken)
