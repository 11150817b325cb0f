"""TERM, INT and USR1 ask a process to end in good order, and a second one ends it at once.

Schedulers send them ahead of a time limit, on `scancel` and for preemption; people press Ctrl-C. What ends in good
order asks `heard()` where it can.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from types import FrameType

from engine.comm.communicator import Communicator, Stopped
from engine.comm.launch import detect_launch
from loaders.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_S = 1.0
"""Launchers and terminals tell a process and its parent, which passes it on: within this time it is the same one."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class _Ears:
    """What this process has heard. A thread is told of each signal at once, also while the main one is in C code."""

    def __init__(self) -> None:
        self.first: str | None = None
        self.since, self.same_s = 0.0, SAME_S
        self.children: list[subprocess.Popen] = []
        self._told, self._said = False, "SIGNAL: ends at the next step; a second one ends at once\n"
        with contextlib.suppress(UserError):  # said elsewhere
            if detect_launch().rank:
                self._said = ""
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        threading.Thread(target=self._hear, args=(reading,), daemon=True, name="signals").start()
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)

    def close(self) -> None:
        """Hear no more: others do."""
        os.close(self._writing)

    def _note(self, number: int, _: FrameType | None = None) -> None:
        if self.first is None:
            self.first, self.since = signal.Signals(number).name, time.monotonic()

    def _hear(self, reading: int) -> None:
        while heard := os.read(reading, 64):
            for number in heard:
                if number not in SIGNALS:
                    continue
                self._note(number)
                if not self._told:
                    self._told = True
                    self._say(self._said.replace("SIGNAL", str(self.first)))
                    for child in list(self.children):
                        child.send_signal(number)
                elif time.monotonic() - self.since > self.same_s:
                    self._say(f"{signal.Signals(number).name} again: ends at once\n" if self._said else "")
                    os._exit(128 + number)
        os.close(reading)

    @staticmethod
    def _say(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            os.write(2, text.encode())


_ears: _Ears | None = None


def listen() -> None:
    """From now on the first of `SIGNALS` is noted, and the next ends this process; from the main thread.

    Never taken back: the default would kill a process that is just ending in good order.
    """
    global _ears
    before, _ears = _ears, _Ears()
    if before is not None:
        before.close()


def heard() -> str | None:
    """Name of the first signal since `listen()`."""
    return None if _ears is None else _ears.first


def stop_if_heard(comm: Communicator, said: str) -> None:
    """Stopped on all ranks, which call this together, where one has heard a signal; `said`: when, and what is left."""
    names = sorted({name for name in comm.exchange(heard()) if name})
    if names:
        raise Stopped(f"stopped by {', '.join(names)} {said}")


@contextlib.contextmanager
def passed_on(children: list[subprocess.Popen]) -> Iterator[None]:
    """What this process hears within the block, its children are told too, also those that are added meanwhile."""
    assert _ears is not None, "signals are listened to from the first line of main"
    _ears.children = children
    try:
        yield
    finally:
        _ears.children = []


def end_with(parent: int) -> None:
    """Let SIGTERM come to this process, too, when the process `parent` that started it ends, however it does.

    The kernel sends it with the end of each thread of the parent that had this process for a child in turn.
    """
    if _ears is not None:
        _ears.same_s = 10 * SAME_S
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGTERM)
