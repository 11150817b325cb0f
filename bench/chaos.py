"""python -m bench.chaos: goodput of a run that is disturbed again and again, and started again by jobs/supervise.py.

  python -m bench.chaos                                            20 minutes for each of the two runs
  python -m bench.chaos --steps 200 --mean-seconds 1 --most 2      in seconds

A tiny network on handwritten digits trains on 2 ranks (torch.distributed over Gloo, on the CPU) twice: undisturbed, and
with a disturbance each --mean-seconds on average. The two take --turns, since a machine's speed drifts: each is stopped
in good order, and goes on later. Said are the images per second of both, starts included, what share of the one the
other is, and whether both ended with the same weights and momentum, to the byte.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.whole import json_text, write_json
from loaders.arguments import COUNT, SEEDS, Number, as_path
from loaders.errors import UserError
from loaders.output import as_command

ROOT = Path(__file__).resolve().parents[1]
BATCH = 64
NAMES = "undisturbed", "disturbed"
_ROOM = "64m"  # of the file system that is filled
_PILOT_S = 10.0  # of training, to know how many steps the time holds


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m bench.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--minutes", action=Number, within=(0.05, 1e4), default=20.0, help="undisturbed (default: %(default)s)")
    add("--steps", action=Number, within=COUNT, help="of both runs, in place of --minutes")
    add("--mean-seconds", action=Number, within=(0.5, 1e5), default=60.0, help="between two (default: %(default)s)")
    add("--most", action=Number, within=COUNT, help="disturbances (default: no limit)")
    add("--turns", action=Number, within=COUNT, default=4, help="of each run (default: %(default)s)")
    add("--kinds", metavar="A,B,…", help="which ones (default: all that can be)")
    add("--seed", action=Number, within=SEEDS, default=0, help="of what happens when (default: %(default)s)")
    add("--save-every", action=Number, within=COUNT, help="steps between checkpoints (default: about 1 s)")
    add("--timeout", action=Number, within=(1.0, 1e4), default=3.0, help="comm.timeout_s (default: %(default)s)")
    add("--folder", type=as_path, metavar="DIR", help="where both runs go (default: a temporary folder)")
    add("--json", type=as_path, metavar="FILE")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = parser().parse_args(argv)
    from bench.disturbed import disturb, supervised
    from bench.measured import timing  # torch, which --help need not wait for

    kinds = list(disturb.KINDS) if options.kinds is None else options.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in disturb.KINDS]:
        raise UserError(f"there is no disturbance {unknown[0]!r}; there are: {', '.join(disturb.KINDS)}")
    hardware = timing.hardware()  # with the load before ours
    with contextlib.ExitStack() as stack:
        place = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        disks = [_small_disk(place / name, "disk_full" in kinds) for name in NAMES]
        (quiet, reason), (small, _) = [stack.enter_context(disk) for disk in disks]
        if reason:
            print(f"disk_full is left out: {reason}", flush=True)
            kinds.remove("disk_full")
        pack = _pack(place)
        steps, every = options.steps, options.save_every
        if steps is None or every is None:
            rate = _rate(_command(pack, place / "pilot", 10**7, 10**7, options.timeout), place / "pilot")
            steps = steps or max(1, round(rate * 60 * options.minutes))
            every = every or max(1, round(rate))
        runs = [
            supervised.Run(
                name, _command(pack, disk / "run", steps, every, options.timeout), disk / "run", steps, BATCH
            )
            for name, disk in zip(NAMES, (quiet, small), strict=True)
        ]
        runs[1].job = disturb.Job(
            runs[1].folder, small / "filler", random.Random(options.seed), options.mean_seconds / 4
        )
        runs[1].due = itertools.islice(disturb.schedule(options.seed, options.mean_seconds, kinds), options.most)
        for turn in range(options.turns):
            for run in runs:
                run.go_on(-(-steps * (turn + 1) // options.turns), place / f"{run.name}-{turn}.log")
        identical = _identical(*(run.folder for run in runs))
    seconds, done = {run.name: run.seconds for run in runs}, runs[1].done
    found: dict[str, Any] = {
        "goodput_percent": 100 * runs[0].seconds / runs[1].seconds,
        "identical": identical,
        "images_per_second": {name: steps * BATCH / taken for name, taken in seconds.items()},
        "disturbances": {kind: sum(one["kind"] == kind for one in done) for kind in kinds},
        "starts": {run.name: run.starts for run in runs},
        "back_after_s": [one["back_after_s"] for one in done if "back_after_s" in one],
        "turns": [
            {name: {"steps": upto, "seconds": taken} for name, (upto, taken) in zip(NAMES, pair, strict=True)}
            for pair in zip(*(run.turns for run in runs), strict=True)
        ],
    }
    print(json_text(found, indent=1))
    result = timing.record(
        shlex.join(["python", "-m", "bench.chaos", *(sys.argv[1:] if argv is None else argv)]),
        {name: timing.summarize([1e3 * taken]) for name, taken in seconds.items()},
        supports="reliability",
        spread=f"one run of each, in {options.turns} turns",
        **found,
        ranks=supervised.RANKS,
        steps=steps,
        batch=BATCH,
        steps_between_checkpoints=every,
        timeout_s=options.timeout,
        seed=options.seed,
        mean_seconds=options.mean_seconds,
        kinds={kind: disturb.KINDS[kind] for kind in kinds},
        left_out=reason,
        done=done,
    )
    result["hardware"] = hardware
    if options.json:
        write_json(options.json, result)
    return 0 if identical else 1


@contextlib.contextmanager
def _small_disk(place: Path, wanted: bool) -> Iterator[tuple[Path, str]]:
    """A file system of `_ROOM` at `place`, and ""; where there can be none the folder, and why."""
    place.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={_ROOM}", "boosterbit-chaos", str(place)]
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace") if wanted else None
    except OSError as error:
        done, reason = None, f"no mount: {error.strerror}"
    else:
        reason = "" if done is None or done.returncode == 0 else f"no file system to fill: {done.stderr.strip()}"
    try:
        yield place, reason
    finally:
        if done is not None and done.returncode == 0:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def _pack(place: Path) -> Path:
    path = place / "digits.h5"
    words = [sys.executable, "-m", "loaders.pack", "sklearn:digits", str(path), "--workers", "0", "--force"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(f"the digits could not be packed: {done.stderr.strip()}")
    return path


def _command(pack: Path, folder: Path, steps: int, every: int, timeout: float) -> list[str]:
    """Words for `python` that are the run."""
    from bench.disturbed.supervised import RANKS

    settings = {
        "name": "chaos", "folder": folder, "data.train": pack, "data.backend": "host", "comm.backend": "torch",
        "comm.timeout_s": timeout, "train.device": "cpu", "train.global_batch": BATCH, "train.checkpoint_every": every,
        "train.log_every": max(1, every // 4), "schedule.epochs": "null", "schedule.steps": steps,
        "schedule.warmup_steps": 0,
    }  # fmt: skip
    words = ["-m", "bench.disturbed.ranks", str(RANKS), "-m", "engine.pretrain", "demo"]
    return [*words, *(f"{key}={value}" for key, value in settings.items())]


def _rate(command: list[str], folder: Path) -> float:
    """Steps per second of a run, which is ended then."""
    from bench.disturbed.supervised import environment, step_of

    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not (first := step_of(folder)):
            if process.poll() is not None:
                raise UserError(
                    f"the run ended with code {process.returncode} before it trained: {shlex.join(command)}"
                )
            time.sleep(0.1)
        start = time.monotonic()
        time.sleep(_PILOT_S)
        return (step_of(folder) - first) / (time.monotonic() - start)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _identical(one: Path, other: Path) -> bool:
    """Whether two runs have ended with the same weights and momentum, to the byte."""
    import torch

    from engine.saving import checkpoint

    found = [checkpoint.load(checkpoint.find(folder)) for folder in (one, other)]
    weights = [(each.path / checkpoint.WEIGHTS).read_bytes() for each in found]
    momenta = [[each["momentum_buffer"] for each in one.state["optimizer"]["state"].values()] for one in found]
    return weights[0] == weights[1] and all(map(torch.equal, *momenta))


if __name__ == "__main__":
    as_command(main)
