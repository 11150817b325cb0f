"""`python -m engine.pretrain RECIPE|file.yaml [key=value …]`: train a network of the BiT family from a pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engine import cli
from engine.comm.communicator import Communicator
from engine.config.loading import to_yaml
from engine.config.schema import AUTO, PretrainConfig
from engine.saving import signals, watchdog
from loaders.output import as_command

if TYPE_CHECKING:  # what training needs is imported when it begins: --help and its like answer without torch
    from engine.training.run import Run
    from engine.training.trainer import Hook

ABOUT = """Pre-train a network of the BiT family from a packed dataset.

  python -m loaders.pack sklearn:digits digits.h5                        a first try, half a minute:
  python -m engine.pretrain demo data.train=digits.h5 data.holdout=0.2

  python -m engine.pretrain imagenet1k_r50x1 data.train=train.h5 data.val=val.h5
  srun python -m engine.pretrain imagenet21k_r152x4 data.train=... (as many tasks as GPUs)
  mpirun -np 2 python -m engine.pretrain my.yaml train.global_batch=256

Makes the folder runs/NAME: checkpoints, metrics.jsonl, TensorBoard, curves.png, the resolved configuration.
The same command again goes on from the newest checkpoint, on any number of ranks."""


def pretrain(
    config: PretrainConfig, comm: Communicator, dry_run: bool = False, *, own_hooks: Sequence[Hook] = ()
) -> None:
    """Build the parts of the run, and train. UserErrors come together on all ranks. `own_hooks`: see `Run`."""
    from engine.training.run import rehearse, train

    with watchdog.watching(comm, config.comm.timeout_s):
        config = with_micro_batch(config, comm)
        with comm.together():
            run = replace(pretraining(config, comm), own_hooks=tuple(own_hooks))
        if dry_run:
            rehearse(run, comm)
            return
        train(run, comm)
    if comm.leads:
        print(f"finished: {run.folder} holds checkpoints, metrics.jsonl, curves.png, tensorboard", flush=True)


def with_micro_batch(config: PretrainConfig, comm: Communicator) -> PretrainConfig:
    """The configuration with a number in the place of train.micro_batch=auto."""
    if config.train.micro_batch != AUTO:
        return config
    from engine.training import assemble
    from engine.tuning import micro_batch

    with comm.together():
        parts = assemble.pretraining(config, comm)
    size = micro_batch.settled(parts, Path(config.folder), ("train", "micro_batch"), comm)
    return replace(config, train=replace(config.train, accumulate=1, micro_batch=str(size)))


def pretraining(config: PretrainConfig, comm: Communicator) -> Run:
    """The run that a configuration describes."""
    from engine.training import assemble
    from engine.training.precision import bad_steps
    from engine.training.run import Run
    from engine.training.timetable import timetable

    parts = assemble.pretraining(config, comm)
    times = timetable(config.schedule, config.optim, parts.feed.plan.epoch_samples, config.train.global_batch)
    often = config.train.checkpoint_every
    return Run(
        parts=parts,
        times=times,
        title=config.name,
        folder=Path(config.folder),
        config=to_yaml(config),
        resume=config.resume,
        log_every=config.train.log_every,
        eval_every=config.train.eval_every * times.steps_per_epoch,
        async_save=config.train.async_save,
        tracking=config.train.tracking,
        keep=config.train.keep,
        keep_best=config.train.keep_best,
        save_every=(times.steps_per_epoch, *([float(often)] if often else [])),
        comm=config.comm,
        graph=config.train.graph,
        bad_steps=bad_steps(config.train.bad_steps, config.train.precision),
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    signals.listen()
    parser = cli.parser("pretrain", PretrainConfig, ABOUT)
    arguments = parser.parse_intermixed_args(argv)
    if cli.answered(parser, PretrainConfig, "pretrain", arguments):
        return
    body = partial(pretrain, dry_run=arguments.dry_run)
    cli.start(PretrainConfig, "pretrain", arguments.recipe, arguments.settings, body)


if __name__ == "__main__":
    as_command(main)
