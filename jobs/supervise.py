#!/usr/bin/env python3
"""Run a command, and start it again where it ended before its work was done: stopped, killed, hanging.

  python -m jobs.supervise --folder runs/demo -- python -m engine.pretrain demo data.train=digits.h5 data.holdout=0.2
  python -m jobs.supervise --folder RUN -- mpirun -np 4 python -m engine.pretrain RECIPE folder=RUN …

Code 0 ends it, and code 2 (input that cannot be used) unless a checkpoint was made before, as when a disk got full. It
ends as well where the run has diverged, where it was itself told to (TERM, INT and USR1 are passed on to the command),
and after --restarts starts in a row that left no newer checkpoint in RUN/checkpoints. Before each of these it waits,
twice as long as before the last. Its code is the command's, or 128 and the number of the signal that killed that.

Importing torch is most of a start. With --warm MODULES this process imports them once, and a command that is
`python -m …` is forked from it: bench/disturbed/ranks.py then starts ranks on this host in a fraction of a second."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.saving import places
from loaders.arguments import COUNT, Number, as_path
from loaders.errors import SystemRefusal, UserError, in_words
from loaders.output import as_command

DONE, UNUSABLE, STOPPED, HUNG = 0, 2, 75, 124
"""Codes that the engine's commands end with; see docs/reliability.md."""
_POLL_S = 0.1
_LONGEST = 32  # times --wait
_MEANS = {UNUSABLE: " (what it was given cannot be used)", STOPPED: " (stopped in good order)",
          HUNG: " (the watchdog: nothing went on)"}  # fmt: skip
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Rules:
    """When a command is started again."""

    restarts: int  # starts in a row that leave no newer checkpoint
    wait_s: float  # before the first of them; each later one waits twice as long
    silent_s: float  # without a touch of RUN/lock, then it is killed
    leave_stopped: bool  # code 75 ends it too: a queue starts the job again

    def wait_before(self, fruitless: int) -> float:
        """Seconds before a start that follows so many without a newer checkpoint."""
        return self.wait_s * min(2 ** (fruitless - 1), _LONGEST) if fruitless else 0.0


class Forked:
    """`python -m …` as a process that was forked from this one: what that had imported need not be imported again.

    words: those after `python`; env: what is added to its environment. Used as a `subprocess.Popen` is.
    """

    def __init__(self, words: Sequence[str], env: Mapping[str, str], session: bool = False) -> None:
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_become, args=(list(words), dict(env), session))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _become(words: list[str], env: dict[str, str], session: bool) -> None:
    if session:
        os.setsid()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(env)
    sys.argv = words[1:]  # runpy puts the name of the file in the first place
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


class Supervisor:
    """Starts `command` until its work is done; `folder`: of its run; `warm`: it is forked from this process."""

    def __init__(self, command: Sequence[str], folder: Path, rules: Rules, warm: bool = False) -> None:
        self._command, self._folder, self._rules, self._warm = list(command), folder, rules, warm
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._told: str | None = None  # the first signal to this process
        self._starts = self._fruitless = 0
        self._reached = 0
        self._first = self._reached = self._newest()

    def run(self) -> int:
        """The code to end with. UserError where the command cannot be started."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what outlives its launcher can then be found
        for number in _SIGNALS:
            signal.signal(number, self._pass_on)
        while True:
            before, start = self._diverged(), time.monotonic()
            code, said = self._live()
            newest = self._newest()
            further = max(newest - self._reached, 0)
            self._reached = max(newest, self._reached)
            self._fruitless = 0 if further else self._fruitless + 1
            self._say(f"start {self._starts} {said} after {time.monotonic() - start:.0f} s, at step {newest}, "
                      f"{further} further than before")  # fmt: skip
            reason = self._why_end(code, before)
            if reason is not None:
                self._say(reason)
                return code if code >= 0 else 128 - code
            if wait := self._rules.wait_before(self._fruitless):
                self._say(f"{self._fruitless} of {self._rules.restarts} without a newer checkpoint: waits {wait:g} s")
            until = time.monotonic() + wait
            while time.monotonic() < until and not self._told:
                time.sleep(min(_POLL_S, max(0.0, until - time.monotonic())))
            if self._told:
                self._say(f"told {self._told}: not started again")
                return code if code >= 0 else 128 - code

    def _live(self) -> tuple[int, str]:
        """One life of the command, and of all that it has started: its code, and how it ended, in words."""
        self._starts += 1
        self._say(f"start {self._starts}, from step {self._newest()}")
        process = self._process = self._start()
        if self._told:  # just before
            process.send_signal(signal.SIGTERM)
        touched, since, silent = self._touched(), time.monotonic(), False
        while not silent and process.poll() is None:
            time.sleep(_POLL_S)
            if (now := self._touched()) != touched:
                touched, since = now, time.monotonic()
            silent = time.monotonic() - since > self._rules.silent_s
        self._end_the_rest()
        code = process.wait()
        self._process = None
        if silent:
            return HUNG, f"gave no sign of life for {self._rules.silent_s:g} s and was killed"
        if code < 0:
            return code, f"was killed by {signal.Signals(-code).name}"
        return code, f"ended with code {code}{_MEANS.get(code, '')}"

    def _start(self) -> subprocess.Popen[bytes] | Forked:
        if self._warm:
            return Forked(self._command[1:], {}, session=True)
        try:
            return subprocess.Popen(self._command, start_new_session=True)
        except OSError as error:
            raise UserError(f"{self._command[0]} cannot be started: {in_words(error, self._command[0])}") from error

    def _why_end(self, code: int, diverged_before: dict[Path, int]) -> str | None:
        """Why the command is not started again; None: it is."""
        if code == DONE:
            return "the work is done"
        if self._told:
            return f"told {self._told}: not started again"
        if code == STOPPED and self._rules.leave_stopped:
            return "whoever started this job starts it again"
        if self._diverged() != diverged_before:
            return "training has diverged, and would again; see checkpoints/diverged-…"
        if code == UNUSABLE and self._reached == self._first:
            return "it would end in the same way again"
        if self._fruitless > self._rules.restarts:
            return f"{self._fruitless} starts in a row left no newer checkpoint"
        return None

    def _newest(self) -> int:
        """Step of the newest checkpoint; 0 where there is none."""
        with contextlib.suppress(SystemRefusal):  # a file system that is away for a while: the last that was seen
            found = places.complete(self._folder / "checkpoints")
            return places.step_of(found[-1]) if found else 0
        return self._reached

    def _diverged(self) -> dict[Path, int]:
        found = {}
        for path in places.diverged(self._folder / "checkpoints"):
            with contextlib.suppress(OSError):
                found[path] = path.stat().st_mtime_ns
        return found

    def _touched(self) -> int | None:
        with contextlib.suppress(OSError):  # not there yet, or a file system that is away for a while
            return os.stat(self._folder / "lock").st_mtime_ns
        return None

    def _end_the_rest(self) -> None:
        """Kill what is left of a life: ranks outlive a launcher that was killed, and would hold the run's folder."""
        while left := children(os.getpid()):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in left:
                if self._process is None or pid != self._process.pid:  # that one is waited for by its object
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, 0)
                else:
                    self._process.wait()

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self._told = self._told or signal.Signals(number).name
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    @staticmethod
    def _say(text: str) -> None:
        print(f"supervise {datetime.now(UTC):%Y-%m-%d %H:%M:%S}: {text}", file=sys.stderr, flush=True)


def children(parent: int, living: bool = False) -> list[int]:
    """The processes whose parent is `parent`; also those that have ended and that nobody has waited for, unless only
    `living` ones are asked for."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just gone
            fields = (place / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == parent and not (living and fields[0] in "ZX"):
                found.append(int(place.name))
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m jobs.supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("command", nargs="+", metavar="COMMAND", help="what is run, after --")
    add("--folder", type=as_path, required=True, metavar="RUN", help="of the run, as in folder=RUN")
    add("--restarts", action=Number, within=COUNT, default=5, help="in a row without a newer checkpoint (%(default)s)")
    add("--wait", action=Number, within=(0.0, 1e6), default=10.0, metavar="S", help="before the first (%(default)s)")
    add("--silent", action=Number, within=(1.0, 1e6), default=300.0, metavar="S",
        help="without a sign of life in RUN/lock, then the command is killed (%(default)s)")  # fmt: skip
    add("--warm", metavar="MODULES", help="imported once, for a command that is python -m; separated by commas")
    add("--leave-75", action="store_true", help="code 75 ends it too: for a job that goes back to its queue")
    return result


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    options = parser().parse_args(argv)
    rules = Rules(options.restarts, options.wait, options.silent, options.leave_75)
    if options.warm:
        if options.command[1:2] != ["-m"] or "python" not in Path(options.command[0]).name:
            raise UserError(f"--warm is for a command that is python -m MODULE …, not {options.command[0]}")
        for name in options.warm.split(","):
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise UserError(f"--warm {name}: {error}") from error
    return Supervisor(options.command, options.folder, rules, bool(options.warm)).run()


if __name__ == "__main__":
    as_command(main)
