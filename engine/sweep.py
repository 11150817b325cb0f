"""`python -m engine.sweep SWEEP.yaml`: fine-tuning runs over targets × checkpoints × shots × seeds, resumable."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from engine import cli
from engine.comm.communicator import Communicator, Stopped
from engine.comm.launch import Launch, detect_launch, variable
from engine.finetune import finetune
from engine.saving import signals
from engine.transfer import fewshot, results, sweep_file
from engine.transfer.record import check_writable, fingerprint, settle
from engine.transfer.sweep_file import Run
from loaders.arguments import WORKERS, Number, as_path, program
from loaders.errors import UserError, in_words
from loaders.lock import InUse, Lock
from loaders.output import as_command
from loaders.packs import agree
from loaders.packs.shard import Pack

ABOUT = """Fine-tune on targets × checkpoints × shots × seeds, as one file says, and collect the results.

  python -m engine.sweep transfer.yaml               one run after another
  python -m engine.sweep transfer.yaml --workers 4   4 at a time: one for each GPU, or shares of the cores
  srun -n 16 python -m engine.sweep transfer.yaml    a share for each task; Slurm arrays share too
  jobs/submit.py sweep:transfer.yaml --nodes 8       the same as an array of jobs

Results go to FOLDER/results.jsonl, a line for each run, and at the end also to FOLDER/results.csv in the published
columns. The same command again does only the runs that are missing. Tables and figures: bench/report.py.

A small one on digits, from the network that the example of `engine.pretrain --help` makes:

  echo '{name: digits, checkpoints: {demo: runs/demo, random: random}, shots: [1], seeds: [0],
    set: {model: R8x0.25-8px}, targets: {digits: {recipe: demo, train: train.h5, test: test.h5}}}' > digits.yaml
  python -m loaders.pack sklearn:digits train.h5 --part train --holdout 0.3
  python -m loaders.pack sklearn:digits test.h5 --part test --holdout 0.3
  python -m engine.sweep digits.yaml

All that a file can say:

  name: transfer
  folder: runs/transfer             # default: runs/NAME
  keep: none                        # networks to keep in FOLDER/networks: all, none, or best: of each target's scores
  checkpoints: {imagenet21k_r50x1: runs/imagenet21k_r50x1, bit_m: BiT-M-R50x1.npz, random: random}
  shots: [1, 5, 10, 100, full]      # default: full
  seeds: [0, 1, 2, 3, 4]            # default: these
  set: {precision: bf16, model: R50x1}   # settings of engine.finetune for every run; random has to know its network
  targets:
    pets: {train: pets-train.h5, test: pets-test.h5}     # the recipe is the target's name, unless it says another
    chest:
      recipe: xray
      train: [a-train.h5, b-train.h5]
      test: chest-test.h5
      shots: full                   # shots, seeds, checkpoints (names) of its own, in place of the sweep's
      checkpoints: [random]
      set: {lr: 0.003, rule: {steps: 1000}}"""

_PARENT = "BOOSTERBIT_SWEEP"  # in the environment of workers: the process that they end with


@dataclass(frozen=True)
class Share:
    """Which of the runs this process does: every `count`-th, beginning with `index`."""

    index: int = 0
    count: int = 1

    def of(self, runs: list[Run]) -> list[Run]:
        """The runs of this share."""
        return runs[self.index :: self.count]

    def part(self, index: int, count: int) -> Share:
        """One of `count` equal parts of this share."""
        return Share(self.index * count + index, self.count * count)


def asked(text: str | None, env: Mapping[str, str] = os.environ) -> Share:
    """The share that `--share K/N` says, or else the place in a Slurm array."""
    if text is None:
        task, first, step, count = (
            variable(env, f"SLURM_ARRAY_TASK_{name}", default)
            for name, default in (("ID", 0), ("MIN", 0), ("STEP", 1), ("COUNT", 1))
        )
        return Share((task - first) // max(step, 1), max(count, 1))
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 0 <= index < count:
        raise UserError(f"--share is {text!r}; expected K/N with K from 0 to N - 1")
    return Share(index, count)


def done(path: Path) -> dict[tuple, str]:
    """Identity → fingerprint of the settings, of each run that a results file holds."""
    if not path.exists():
        return {}
    content, found = path.read_bytes(), {}
    for number, line in enumerate(lines := content.splitlines(), 1):
        try:
            result = json.loads(line)
            found[tuple(result[name] for name in ("dataset", "pretrained_model", "shot", "seed"))] = result["settings"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines) and not content.endswith(b"\n"):  # the line that a killed run was writing
                break
            raise UserError(
                f"{path}, line {number} is no result of engine.finetune; give the sweep a folder of its own, or take "
                "that line away"
            ) from error
    return found


def missing(sweep: sweep_file.Sweep) -> list[Run]:
    """The runs without a result. UserError where one has a result of other settings."""
    there = done(sweep.results)
    for run in sweep.runs:
        if run.key in there and there[run.key] != fingerprint(run.config):
            raise UserError(
                f"{sweep.results} holds {run.title} with other settings than {sweep.path} has now; choose another "
                "folder, or remove those lines"
            )
    return [run for run in sweep.runs if run.key not in there]


def work(sweep: sweep_file.Sweep, mine: Share, launch: Launch) -> int:
    """Do this process's share of the runs that are missing; the exit code."""
    settle(sweep.results)
    todo = missing(sweep)
    if todo:
        check_writable(sweep.results)
    wanted = {run.key for run in todo}
    chosen = [run for run in mine.of(sweep.runs) if run.key in wanted]
    here = f" of which this process does {len(chosen)}" if mine.count > 1 else ""
    print(f"{sweep.path}: {len(sweep.runs)} runs, {len(todo)} to do{here}; results in {sweep.results}", flush=True)
    _describe_targets(chosen)
    comm, started, number = Communicator(Launch("alone", local_rank=launch.local_rank)), time.perf_counter(), 0
    failed: list[Run] = []
    others = 0
    queue = deque((run, _lock(sweep, run), False) for run in chosen)
    while queue:
        if signals.heard():
            return _stopped(f"{number} of {len(chosen)} are done")
        run, lock, again = queue.popleft()
        begun = time.perf_counter()
        try:
            lock.take(wait=again)
            said = _scored(finetune(run.config, comm, quiet=True)) if run.key not in done(sweep.results) else "done"
            sweep.prune()
        except InUse as error:
            if not again:  # by then the other may have ended, or be known to have
                queue.append((run, lock, True))
                continue
            others += 1
            said = str(error)
        except Stopped as stop:
            return _stopped(f"[{number + 1}/{len(chosen)}] {run.title}: {stop}")
        except UserError as error:  # this one diverged, or its images are damaged; the others need not suffer
            failed.append(run)
            said = f"failed: {error}"
        finally:
            lock.release()
        number += 1
        now = time.perf_counter()
        left = timedelta(seconds=round((now - started) / number * (len(chosen) - number)))
        print(f"[{number}/{len(chosen)}] {run.title}: {said}  ({now - begun:.0f} s; left {left})", flush=True)
    settle(sweep.results)
    sweep.prune()
    collect(sweep)
    if sweep.keep != "none":
        print(f"networks are in {sweep.results.parent / 'networks'}", flush=True)
    for run in failed:
        print(f"failed: {run.title}", file=sys.stderr)
    if failed:
        return 1
    return _stopped(f"{others} runs are left to other processes") if others else 0


def _lock(sweep: sweep_file.Sweep, run: Run) -> Lock:
    """Of one run, so that any number of processes may share a sweep, started together or not."""
    name = hashlib.sha256(repr(run.key).encode()).hexdigest()[:16]
    return Lock(sweep.results.with_name(f".{name}.lock"), run.title, "it is left to that")


def _stopped(said: str) -> int:
    print(f"{said}; the same command does the runs that are missing", file=sys.stderr, flush=True)
    return Stopped.exit_code


def _describe_targets(runs: list[Run], counts: bool = True) -> None:
    """What there is to know of images trained and scored on, and `counts` of label vectors, once for each target."""
    for name, config in {run.target: run.config for run in runs}.items():
        train = Pack.open(config.data.train)
        test = agree.open_test(config.data.test, train)
        said = [agree.shared(train, test, ("train", "test"), config.data.overlap)]
        if counts:
            from engine.training import assemble  # brings torch, which a list need not wait for

            said.append(assemble.label_counts(train, test, config.data.metric == "mean_auc").lstrip("\n"))
        if any(said):
            print("\n".join([f"{name}:", *filter(None, said)]), flush=True)


def _scored(line: dict) -> str:
    """A run's score, and what is unusual about it."""
    said = f"{line['metric'].replace('_', ' ')} {line['metric_value']:.2f}%"
    if line["metric"] == "mean_auc":
        said += f" over {line['auc_classes']} labels"
    return said + (f"; {fewshot.shortage(line['shot'], line['short_classes'])}" if line["short_classes"] else "")


def collect(sweep: sweep_file.Sweep) -> None:
    """Write what there is of results as CSV; processes that end at the same moment wait for each other."""
    if not sweep.results.exists() or not sweep.results.stat().st_size:
        return
    with open(sweep.results, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        results.write_csv(results.read([sweep.results]), sweep.results.with_suffix(".csv"))


def spread(sweep: sweep_file.Sweep, mine: Share, workers: int) -> int:
    """Let several processes do a share, each with a part of the GPUs or cores; the exit code."""
    missing(sweep)
    import torch  # only counts GPUs here

    gpus = torch.cuda.device_count()
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    children: list[subprocess.Popen] = []
    with signals.passed_on(children):
        for k in range(workers):
            if signals.heard():
                break
            children.append(_worker(sweep, mine.part(k, workers), k, threads, gpus))
            if name := signals.heard():  # before it was among those that are told
                children[-1].send_signal(signal.Signals[name])
        codes = [child.wait() for child in children]
    collect(sweep)
    code = max(codes, key=abs, default=0)
    return Stopped.exit_code if signals.heard() and (code or not children) else code


def _worker(sweep: sweep_file.Sweep, part: Share, k: int, threads: int, gpus: int) -> subprocess.Popen:
    """The `k`-th process, which ends when this one does."""
    env = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ) | {_PARENT: str(os.getpid())}
    if gpus > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        env["CUDA_VISIBLE_DEVICES"] = str(k % gpus)
    command = [sys.executable, "-m", "engine.sweep", str(sweep.path), "--share", f"{part.index}/{part.count}"]
    return subprocess.Popen(command, env=env)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    signals.listen()
    if parent := os.environ.pop(_PARENT, ""):
        signals.end_with(int(parent))
    parser = argparse.ArgumentParser(
        prog=program("engine.sweep"), description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sweep", type=as_path, metavar="SWEEP.yaml", help="what to run, see above")
    add("--workers", action=Number, within=WORKERS, default=1, help="runs at a time on this machine (%(default)s)")
    add("--share", metavar="K/N", help="do every N-th run only, from the K-th on, counted from 0")
    add("--list", action="store_true", help="say which runs are done and which are not, and exit")
    cli.guard(lambda: sys.exit(_run(parser.parse_args(argv))))


def _run(arguments: argparse.Namespace) -> int:
    sweep = sweep_file.read(arguments.sweep)
    launch = detect_launch()
    mine = asked(arguments.share)
    if arguments.list:
        _describe_targets(list(sweep.runs), counts=False)
        todo = {run.key for run in missing(sweep)}
        for run in sweep.runs:
            print(f"{'to do' if run.key in todo else 'done ':6} {run.title}")
        print(f"{len(sweep.runs)} runs, {len(todo)} to do")
        return 0
    try:
        if arguments.workers > 1:
            return spread(sweep, mine, arguments.workers)  # the processes find the launcher's ranks themselves
        return work(sweep, mine.part(launch.rank, launch.size), launch)
    except OSError as error:
        raise UserError(f"{in_words(error)}; the same command goes on with the runs that are missing") from error


if __name__ == "__main__":
    as_command(main)
