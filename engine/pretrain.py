"""`python -m engine.pretrain RECIPE|file.yaml [key=value …]`: train a network of the BiT family from a pack."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from engine import cli
from engine.comm.communicator import Communicator
from engine.config.loading import to_yaml
from engine.config.schema import PretrainConfig
from engine.network import bit, weights
from engine.training import assemble, checkpoint, hooks, metrics
from engine.training.timetable import Timetable, timetable
from engine.training.trainer import Hook, Trainer
from loaders.errors import UserError

ABOUT = """Pre-train a network of the BiT family from a packed dataset.

  python -m engine.pretrain imagenet1k_r50x1 data.train=train.h5 data.val=val.h5
  srun python -m engine.pretrain imagenet21k_r152x4 data.train=... (as many tasks as GPUs)
  mpirun -np 2 python -m engine.pretrain my.yaml train.global_batch=256

Makes the folder runs/NAME: checkpoints, metrics.jsonl, TensorBoard, curves.png, the resolved configuration.
The same command again goes on from the newest checkpoint, on any number of ranks."""


def pretrain(config: PretrainConfig, comm: Communicator, dry_run: bool = False) -> None:
    """Build the parts of the run, and train. UserErrors come together on all ranks."""
    folder = Path(config.folder)
    with comm.together():
        parts = assemble.pretraining(config, comm)
        times = timetable(config.schedule, config.optim, parts.feed.plan.epoch_samples, config.train.global_batch)
        newest = None if dry_run else _resume(config, folder, parts.about)
    step = 0 if newest is None else newest.state["step"]
    progress = hooks.Progress(step, times.total_steps, config.train.global_batch, comm.leads and not dry_run)
    log = metrics.MetricLog(folder) if comm.leads and not dry_run else None
    trainer = Trainer(
        model=parts.model,
        flat=parts.flat,
        optimizer=parts.optimizer,
        batches=parts.feed.train_batches(step, times.total_steps),
        objective=parts.objective,
        learning_rate=times.learning_rate,
        comm=comm,
        precision=parts.precision,
        total_steps=times.total_steps,
        global_batch=config.train.global_batch,
        first_step=step,
        slice_bytes=int(config.comm.slice_mib * 2**20),
        hooks=_hooks(config, comm, parts, times, progress, log),
    )
    with comm.together():
        if newest is not None:
            weights.apply(parts.model, newest.weights, new_head=False)
            trainer.load_state(newest.state)
    parts.broadcast(comm)
    if comm.leads:
        print(parts.summary(comm), flush=True)
    if dry_run:
        _dry_run(trainer, parts, times, comm)
        return
    if comm.leads:
        (folder / "config.yaml").write_text(to_yaml(config))
        surroundings = metrics.environment(comm, parts.precision.device)
        (folder / "environment.json").write_text(json.dumps(surroundings, indent=1) + "\n")
        if newest is not None:
            print(f"goes on from {newest.path}, step {step} of {times.total_steps}", flush=True)
    trainer.fit()
    if comm.leads:
        log.close()
        print(f"finished: {folder} holds checkpoints, metrics.jsonl, curves.png, tensorboard", flush=True)


def _hooks(
    config: PretrainConfig,
    comm: Communicator,
    parts: assemble.Parts,
    times: Timetable,
    progress: hooks.Progress,
    log: metrics.MetricLog | None,
) -> list[Hook]:
    found: list[Hook] = [hooks.Log(config.train.log_every, progress, log, times.steps_per_epoch)]
    if parts.feed.test is not None:
        every = config.train.eval_every * times.steps_per_epoch
        found.append(hooks.Evaluate(lambda: parts.evaluate(comm), every, progress, log, config.name))
    checkpoints = Path(config.folder) / "checkpoints"
    every = config.train.checkpoint_every
    saving = hooks.SaveCheckpoints(checkpoints, parts.about, config.train.keep, times.steps_per_epoch, every)
    return [*found, saving, hooks.StopOnSignal(saving)]


def _resume(config: PretrainConfig, folder: Path, about: dict) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from; UserError where the folder is another run's, or should be new and is not."""
    found = checkpoint.complete(folder / "checkpoints")
    if found and config.resume == "never":
        raise UserError(f"{folder} holds checkpoints up to {found[-1].name}; choose another folder=…, or resume=auto")
    if not found:
        return None
    checkpoint.agree(checkpoint.describe(found[-1]), about, found[-1])
    return checkpoint.load(found[-1])


def _dry_run(trainer: Trainer, parts: assemble.Parts, times: Timetable, comm: Communicator) -> None:
    """Two steps, and what they show of the run."""
    for _ in range(2):
        micro_batches = next(trainer.batches)
        trainer.train_step(micro_batches)
    shape = tuple(micro_batches[0].images.shape)
    reading = trainer.meter.read(comm, trainer.global_batch)
    if comm.leads:
        print(f"micro-batch {shape}, {len(micro_batches)} of them a step on each rank; two steps: "
              f"loss {reading['loss']:.4f}; peak memory {assemble.memory_use(parts.precision.device)}")  # fmt: skip
        flops = bit.cost(parts.network, parts.about["num_classes"], shape[-1]).training_flops
        print(f"{flops / 1e9:.4g} GFLOP per training image; "
              f"{flops * trainer.global_batch / comm.size / 1e12:.4g} TFLOP a step on each rank")  # fmt: skip
        print(times.describe())


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = cli.parser("pretrain", PretrainConfig, ABOUT)
    parser.add_argument("--dry-run", action="store_true", help="build everything, train two steps, write nothing")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.list:
        cli.list_recipes("pretrain")
        return
    if arguments.recipe is None:
        parser.error("which recipe? --list shows those that come with the engine")
    if arguments.print_config:
        cli.guard(partial(cli.print_config, PretrainConfig, arguments.recipe, arguments.settings, "pretrain"))
        return
    body = partial(pretrain, dry_run=arguments.dry_run)
    cli.start(PretrainConfig, "pretrain", arguments.recipe, arguments.settings, body)


if __name__ == "__main__":
    main()
