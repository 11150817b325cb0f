"""Ends a run in which nothing goes on, with a message that says which rank is behind and what it was doing.

A thread of each rank looks whether the rank gets on. Where the run has a folder it tells the others so, through a file:
what the ranks talk over may be what hangs.

    RUN/heartbeats/rank-00001.json   host, process, what it is doing and for how long: renewed all the time
    RUN/stuck/rank-00001.txt         the stacks of its threads, when the run was ended
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.comm.communicator import Communicator
from loaders.lock import start_of

EXIT_CODE = 124  # as of timeout(1)
PATIENCE = 6
"""How many times longer the first step, an evaluation, and a save may take."""
_BEATS = 30  # in the time that is waited
_BYTES = 512  # of a heartbeat: always as many, so that it is replaced in place
_LAST_WORDS_S = 5.0  # for the ranks to write their stacks, and for the launcher to pass on what was said


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    started: int | None  # of the process
    marks: int  # where it is: all ranks pass the same ones
    doing: str
    for_s: float
    slow: bool  # that this may take long
    ended: bool  # that it has given up

    def stuck(self, timeout_s: float) -> bool:
        """Whether nothing has gone on for too long."""
        return self.for_s > timeout_s * (PATIENCE if self.slow else 1)


class Watchdog:
    """Watches from `start` to `stop`; `passed` is told of each bit of progress."""

    def __init__(self, comm: Communicator, timeout_s: float) -> None:
        self._comm, self._timeout, self._tick = comm, timeout_s, min(10.0, timeout_s / _BEATS)
        self._folder: Path | None = None
        self._stopped = threading.Event()
        self._place = 0, "starting", True, time.monotonic()  # replaced as a whole: two threads know it
        self._me = socket.gethostname(), os.getpid(), start_of(os.getpid())
        self._seen: dict[int, tuple[Sign, float]] = {}  # of other ranks, and when it was new
        self._ended = False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        if self._folder and self._comm.leads:
            shutil.rmtree(self._folder / "heartbeats", ignore_errors=True)

    def share(self, folder: Path) -> None:
        """From now on the ranks see each other, and stacks go to files, below the folder of the run."""
        if self._comm.leads:
            shutil.rmtree(folder / "heartbeats", ignore_errors=True)  # of a run that was killed, of other ranks
            if self._comm.size > 1:
                (folder / "heartbeats").mkdir()
        self._folder = folder
        self._beat()

    def passed(self, doing: str, slow: bool, counts: bool) -> None:
        begins = slow and not self._place[2]
        self._place = self._place[0] + counts, doing, slow, time.monotonic()
        if begins:  # the thread may not get a word in while it saves
            self._beat()

    def _sign(self) -> Sign:
        marks, doing, slow, since = self._place
        return Sign(self._comm.rank, *self._me, marks, doing, time.monotonic() - since, slow, self._ended)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(self._tick):
            now = time.monotonic()
            if now - before > self._timeout / 2:  # this process was stopped: its time does not count
                self._place = *self._place[:3], now
            before = now
            self._beat()
            mine = self._sign()
            if mine.for_s <= self._timeout / 2:
                continue
            others = self._others()
            if any(other.ended for other in others) or (
                mine.stuck(self._timeout) and all(other.stuck(self._timeout) for other in others)
            ):
                self._end()

    def _file(self, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / "heartbeats" / f"rank-{rank:05d}.json"

    def _beat(self) -> None:
        if self._folder is None or self._comm.size == 1:
            return
        sign = json.dumps(vars(self._sign())).encode()
        with contextlib.suppress(OSError):  # a full disk ends no run; the others see that the sign gets old
            handle = os.open(self._file(self._comm.rank), os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.write(handle, sign.ljust(_BYTES))
            finally:
                os.close(handle)

    def _others(self) -> list[Sign]:
        """The newest sign of each other rank, aged since it was seen to be new. Hosts' clocks are not compared."""
        if self._folder is None:
            return []
        now = time.monotonic()
        for rank in set(range(self._comm.size)) - {self._comm.rank}:
            with contextlib.suppress(OSError, ValueError, TypeError):  # not there yet, or just being written
                sign = Sign(**json.loads(self._file(rank).read_bytes()))
                if rank not in self._seen or self._seen[rank][0] != sign:
                    self._seen[rank] = sign, now
        return [Sign(**{**vars(sign), "for_s": sign.for_s + now - new}) for sign, new in self._seen.values()]

    def _silent(self, rank: int) -> bool:
        return time.monotonic() - self._seen[rank][1] > 3 * self._tick

    def _end(self) -> None:
        """Say who is behind, and end this rank and with it the others."""
        guard = threading.Timer(4 * _LAST_WORDS_S, os._exit, (EXIT_CODE,))  # a file system may hang as well
        guard.daemon = True
        guard.start()
        self._ended = True
        self._beat()
        self._write_stacks()
        until = time.monotonic() + _LAST_WORDS_S
        while time.monotonic() < until and any(not (one.ended or self._silent(one.rank)) for one in self._others()):
            time.sleep(self._tick / 2)
        signs = sorted([self._sign(), *self._others()], key=lambda sign: sign.rank)
        living = [each.rank for each in signs if each.rank == self._comm.rank or not self._silent(each.rank)]
        if living[0] == self._comm.rank or self._folder is None:
            print(self._said(signs), file=sys.stderr, flush=True)
            time.sleep(0.5)  # the launcher passes it on
        else:
            time.sleep(_LAST_WORDS_S)
        for sign in signs:
            # A launcher that asks a stopped process to end waits long.
            here = sign.rank not in living and sign.host == self._me[0] and start_of(sign.pid) == sign.started
            if here and sign.started is not None:
                os.kill(sign.pid, signal.SIGKILL)
        self._comm.abort(EXIT_CODE)

    def _write_stacks(self) -> None:
        if self._folder is None:
            faulthandler.dump_traceback(2)
            return
        place = self._folder / "stuck" / f"rank-{self._comm.rank:05d}.txt"
        with contextlib.suppress(OSError):
            place.parent.mkdir(exist_ok=True)
            with open(place, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)

    def _said(self, signs: list[Sign]) -> str:
        last = min(sign.marks for sign in signs)
        lines = [f"error: nothing goes on, on any rank, for longer than comm.timeout_s={self._timeout:g} allows"]
        for sign in signs:
            if sign.marks > last:
                continue
            silent = sign.rank != self._comm.rank and self._silent(sign.rank)
            lines.append(
                f"rank {sign.rank} on {sign.host} (process {sign.pid}){' is behind' if len(signs) > 1 else ''}: "
                f"{'no sign of life, last heard of at ' if silent else ''}{sign.doing}, for {sign.for_s:.0f} s"
            )
        waiting = len(signs) + 1 - len(lines)
        unknown = sorted(set(range(self._comm.size)) - {sign.rank for sign in signs}) if self._folder else []
        lines += [f"no sign was ever seen of rank {', '.join(map(str, unknown))}"] if unknown else []
        lines += [f"{waiting} other ranks wait: {signs[0].doing}"] if 0 < waiting < len(signs) else []
        lines.append(f"stacks are in {self._folder / 'stuck'}" if self._folder else "the stacks stand above")
        return "\n".join([*lines, "The same command goes on from the newest checkpoint, if there is one."])


_watchdog: Watchdog | None = None


@contextlib.contextmanager
def watching(comm: Communicator, timeout_s: float | None) -> Iterator[None]:
    """Around a run. Where nothing goes on for `timeout_s` (None: for ever), on any rank, it ends with `EXIT_CODE`."""
    global _watchdog
    if timeout_s is None:
        yield
        return
    mine, outer = Watchdog(comm, timeout_s), _watchdog
    _watchdog = mine
    mine.start()
    try:
        yield
    finally:
        mine.stop()
        _watchdog = outer


def share(folder: Path | None) -> None:
    """Let the ranks of a run see each other through its folder, which is there and is this run's; rank 0 first."""
    if _watchdog and folder:
        _watchdog.share(folder)


def passed(doing: str, *, slow: bool = False, counts: bool = True) -> None:
    """Say that this rank gets on, and what it does next; `slow`: that this may take long.

    Who has passed least is behind, so all ranks pass the same; what some do more often than others does not count.
    """
    if _watchdog:
        _watchdog.passed(doing, slow, counts)
