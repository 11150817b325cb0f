"""`python -m engine.doctor RUN`, or `--now RECIPE key=value …`: what bounds a run, and which setting to change."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import cli
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch, detect_launch
from engine.comm.mpirun import rank_command, rank_environment
from engine.config.schema import PretrainConfig
from engine.saving import signals
from loaders.arguments import WORKERS, Number, expanded, program
from loaders.errors import UserError
from loaders.output import as_command

if TYPE_CHECKING:
    from engine.monitoring.diagnosis import Facts
    from engine.monitoring.ranks import RankTimes, Timing
    from engine.training.trainer import Trainer
    from loaders.pipelines.batches import Batch

ABOUT = """Why is it slow? One finding, with the figures it rests on and the setting to change.

  python -m engine.doctor runs/demo                                        of a run, going on or ended
  python -m engine.doctor --now demo data.train=digits.h5 data.val=null    head room here, in a minute
  srun python -m engine.doctor --now imagenet1k_r50x1 data.train=…         the same on the ranks of a job

A run writes where each rank's time goes into RUN/timing.jsonl. With --now the steps of a recipe are measured: with a
batch that stays the same, and with its real input; on one rank alone, and on all. Nothing is written."""
USAGE = "[-h] [--ranks RANKS] RUN | --now RECIPE [key=value ...]"
SECONDS = 8.0  # of each of four measurements
_FEWEST = 3  # steps of one


def of_run(folder: Path) -> str:
    """The table and the finding of a run, for people. UserError where it has none."""
    from engine.monitoring import diagnosis

    timing, facts, said = diagnosed(folder)
    return "\n".join([diagnosis.text(timing.table, facts), *timing.named, said])


def diagnosed(folder: Path) -> tuple[Timing, Facts, str]:
    """Where a run's time went, by what it is judged, and the finding for people. UserError where it has none."""
    from engine.monitoring import diagnosis, ranks
    from engine.network import family

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected that of a run, such as runs/imagenet1k_r50x1")
    timing = ranks.read(folder / ranks.FILE)
    known, moved = timing.known, math.nan
    if not family.is_timm(known.network):
        moved = _moved_bytes(known)
    facts = known.facts(moved, timing.link)
    finding = diagnosis.diagnose(timing.table, facts)
    return timing, facts, diagnosis.said(finding) if finding else "no one cause explains what is lost"


def _moved_bytes(known: Any) -> float:
    import torch

    from engine.network.memory import moved_bytes_per_image

    return moved_bytes_per_image(known.network, known.size, getattr(torch, known.dtype), known.recompute)


def headroom(config: PretrainConfig, comm: Communicator, seconds: float = SECONDS) -> None:
    """Measure the steps of a configuration, and print what input and other ranks cost them.

    UserErrors come together on all ranks.
    """
    with comm.together():
        if config.train.global_batch % comm.size:
            raise UserError(
                f"train.global_batch={config.train.global_batch} does not divide over {comm.size} ranks, of which one "
                "is measured alone with its share; change it, or --ranks"
            )
        alone = 0.0, 0.0, ""
        if comm.leads:  # the others wait for it in `together`
            share = replace(config.train, global_batch=config.train.global_batch // comm.size)
            alone = _rates(replace(config, train=share), Communicator(Launch("alone")), seconds)
    same, real, said = _rates(config, comm, seconds) if comm.size > 1 else alone
    if not comm.leads:
        return
    rows = [("the same batch, one rank alone", alone[0]), ("real input, one rank alone", alone[1])]
    if comm.size > 1:
        ranks = f"{comm.size} ranks"
        rows += [(f"the same batch, {ranks}", same / comm.size), (f"real input, {ranks}", real / comm.size)]
    print(f"{'':<32}{'images/s a rank':>16}{'of the first':>14}")
    for name, rate in rows:
        print(f"{name:<32}{rate:>16,.1f}{rate / alone[0]:>14.0%}")
    print(said, flush=True)


def _rates(config: PretrainConfig, comm: Communicator, seconds: float) -> tuple[float, float, str]:
    """Images/s over all ranks with the same batch again and again, and with real input; what bounds the latter."""
    from engine.pretrain import pretraining, with_micro_batch
    from engine.training.run import build_trainer, rank_times

    config = with_micro_batch(config, comm)
    with comm.together():
        run = replace(pretraining(config, comm), folder=None)
        trainer = build_trainer(run, comm, 0, [])
    run.parts.broadcast(comm)
    said: list[str] = []
    times = rank_times(run, comm, 0, said.append)
    trainer.model.train()
    batch = next(trainer.batches)
    _seconds(trainer, times, 2, batch)  # buffers are made
    steps = max(_FEWEST, int(seconds / _seconds(trainer, times, 1, batch)))
    steps = max(1, min(steps, run.times.total_steps - 3))  # so many batches there are
    same = _seconds(trainer, times, steps, batch)
    times = rank_times(run, comm, 0, said.append)
    _seconds(trainer, times, 2)  # what was decoded ahead is used up
    real = _seconds(trainer, times, steps)
    times.finish(trainer)
    trainer.batches.close()  # type: ignore[attr-defined]
    return run.global_batch / same, run.global_batch / real, "\n".join(said)


def _seconds(trainer: Trainer, times: RankTimes, steps: int, batch: Sequence[Batch] | None = None) -> float:
    """Seconds a step, on the slowest rank, of so many of them; of `batch`, or of what comes next."""
    start = time.perf_counter()
    for _ in range(steps):
        trainer.phases.start()
        micro_batches = next(trainer.batches) if batch is None else batch
        trainer.phases.lap("input")
        trainer.train_step(micro_batches)
    trainer.meter.read(trainer.global_batch)  # waits for the device
    taken = (time.perf_counter() - start) / steps
    times.after_step(trainer)
    return max(trainer.comm.exchange(taken))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        usage=f"{program('engine.doctor')} {USAGE}", description=ABOUT, formatter_class=raw
    )
    add = parser.add_argument
    add(
        "words",
        nargs="+",
        metavar="RUN",
        help="a run's folder; after --now: a recipe of engine.pretrain, and key=value",
    )
    add("--now", action="store_true", help="measure here")
    add(
        "--ranks",
        action=Number,
        within=WORKERS,
        default=2,
        help="to measure on, where nothing launched several (%(default)s)",
    )
    given = parser.parse_intermixed_args(argv)
    if not given.now:
        if len(given.words) > 1:
            parser.error(f"one run, or --now: what are {' '.join(given.words[1:])}?")
        cli.guard(lambda: print(of_run(Path(expanded(given.words[0])))))
        return
    signals.listen()
    recipe, *settings = given.words
    if given.ranks > 1 and detect_launch().alone:
        words = ["-m", "engine.doctor", "--now", recipe, *settings]
        cli.guard(partial(_launch, given.ranks, words))
        return
    cli.start(PretrainConfig, "pretrain", recipe, settings, headroom)


def _launch(ranks: int, words: list[str]) -> None:
    done = subprocess.run([*rank_command(ranks), *words], env=rank_environment(ranks))
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    as_command(main)
