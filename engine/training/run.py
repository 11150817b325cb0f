"""A run, from its parts to its last step: what pre-training and fine-tuning have in common."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import yaml

from engine.comm.communicator import Communicator
from engine.comm.device import refuse_shared_gpus
from engine.config.data import DataConfig
from engine.config.schema import CommConfig
from engine.monitoring import curves, metrics, tracking
from engine.monitoring.progress import Progress
from engine.monitoring.ranks import RankTimes, setting
from engine.network import bit, family, weights
from engine.network.memory import moved_bytes_per_image, saved_bytes_per_image
from engine.optim import tree
from engine.optim.gradients import TRAVEL
from engine.saving import checkpoint, places, signals, watchdog
from engine.saving.writer import Writer
from engine.training import assemble, graph, hooks, reproducible
from engine.training.timetable import Timetable
from engine.training.trainer import Hook, Mix, Trainer
from engine.tuning.launching import launching_seconds
from engine.whole import json_text, may_wait
from loaders.errors import UserError, reading
from loaders.lock import Lock


@dataclass(frozen=True)
class Run:
    """What is trained, for how long, and what is kept of it."""

    parts: assemble.Parts
    times: Timetable
    title: str  # over the curves
    folder: Path | None  # for checkpoints, metrics and curves; None: nothing is kept
    config: str  # the resolved configuration as YAML
    resume: str  # "auto": go on from the newest checkpoint in the folder; "never": refuse a folder in use
    log_every: int  # steps
    eval_every: float  # steps; the last step always has an evaluation
    keep: int  # newest checkpoints
    save_every: tuple[float, ...]  # steps between checkpoints, each interval by itself; the last step always has one
    comm: CommConfig  # how gradients travel
    graph: str = "auto"  # whether a step is recorded as a CUDA graph: auto, on, off
    bad_steps: int = 0  # in a row that may be skipped, since their gradients are not finite
    mix: Mix | None = None
    async_save: bool = True  # checkpoints are written while training goes on
    keep_best: bool = False  # besides, the checkpoint with the least validation loss, in the folder's "best"
    tracking: str = "none"  # where metrics go besides: none, wandb, trackio
    intro: str = ""  # a line for people, after what the parts are
    own_hooks: tuple[Hook, ...] = ()  # act after each step, once it is scored and before it is saved; on all ranks

    @property
    def global_batch(self) -> int:
        """Images in a step, over all ranks and micro-batches."""
        return self.parts.feed.plan.global_batch


def train(run: Run, comm: Communicator, *, quiet: bool = False) -> dict[str, float]:
    """Train to the last step, from the newest checkpoint where there is one; the scores of the last evaluation.

    `quiet`: without a word. UserErrors come together on all ranks; Stopped where a signal ended the run before.
    """
    refuse_shared_gpus(run.parts.precision.device, comm)
    if run.parts.precision.reproducible:
        reproducible.check_ranks(run.parts.about[reproducible.ARITHMETIC], comm)
    signals.stop_if_heard(comm, "before the first step; the same command does what is left")
    with _alone_in(run.folder, comm) as lock, Writer(run.async_save) as writer:
        return _train(run, comm, lock, writer, comm.leads and not quiet)


def _train(run: Run, comm: Communicator, lock: Lock | None, writer: Writer, speaks: bool) -> dict[str, float]:
    newest, passed_over = _newest(run, comm)
    step = 0 if newest is None else newest.state["step"]
    progress = Progress(step, run.times.total_steps, run.global_batch, speaks)
    test = run.parts.feed.test
    with comm.together():
        log = _log(run, step) if run.folder and comm.leads else None
    saving = None
    if run.folder:
        place = run.folder / "checkpoints"
        saving = hooks.SaveCheckpoints(place, run.parts.about, run.keep, run.save_every, lock, writer, log)
    scores = hooks.Evaluate(lambda: run.parts.evaluate(comm), run.eval_every, progress, log, run.title, saving)
    times = rank_times(run, comm, step, progress.say)
    with comm.together():
        acts = _hooks(run, progress, log, scores, saving, times)
        trainer = build_trainer(run, comm, step, acts)
        if newest is not None:
            weights.apply(run.parts.model, newest.weights, new_head=False)
            with reading(newest.path / checkpoint.STATE, "the state of this run's optimizer"):
                trainer.load_state(newest.state)
    run.parts.broadcast(comm)
    if speaks:
        _introduce(run, comm)
    if log and run.folder:
        _keep_surroundings(run, run.folder, comm)
    if passed_over:
        progress.say(passed_over)
    if newest is not None:
        progress.say(f"goes on from {newest.path}, step {step} of {run.times.total_steps}")
    if step == run.times.total_steps and test is not None:
        scores.evaluate(trainer)
    trainer.fit()
    if log:
        log.close()
        if test is None:  # nobody else has drawn them
            with may_wait(log.path.with_name("curves.png"), "the run is done without it"):
                curves.plot(log.path, log.path.with_name("curves.png"), run.title)
    return scores.newest


def _log(run: Run, step: int) -> metrics.MetricLog:
    assert run.folder is not None
    tracker = tracking.begin(run.tracking, run.folder, run.title, yaml.safe_load(run.config))
    return metrics.MetricLog(run.folder, step, run.parts.majority, tracker)


def rehearse(run: Run, comm: Communicator) -> None:
    """Two steps (one of a run of one), and what they show of the run. Writes nothing."""
    refuse_shared_gpus(run.parts.precision.device, comm)
    with comm.together():
        trainer = build_trainer(run, comm, 0, [])
    run.parts.broadcast(comm)
    if comm.leads:
        _introduce(run, comm)
        if not family.is_timm(run.parts.network):
            print(_counted_memory(run), flush=True)
    steps = min(2, run.times.total_steps)
    for _ in range(steps):
        signals.stop_if_heard(comm, "in a dry run")
        micro_batches = next(trainer.batches)
        trainer.train_step(micro_batches)
    shape = tuple(micro_batches[0].images.shape)
    reading = trainer.meter.read(trainer.global_batch)
    if comm.leads:
        done = ("one step", "two steps")[steps - 1]
        print(f"micro-batch {shape}, {len(micro_batches)} of them a step on each rank; {done}: "
              f"loss {reading['loss']:.4f}; peak memory {_memory_use(run.parts.precision.device)}")  # fmt: skip
        if not family.is_timm(run.parts.network):
            print(_counted_work(run, shape[-1], comm))
        print(run.times.describe())


def build_trainer(run: Run, comm: Communicator, first_step: int, after_steps: list[Hook]) -> Trainer:
    """What trains a run from `first_step` on, and hooks beside it. UserError where `train.graph=on` cannot be."""
    plan = run.parts.feed.plan
    return Trainer(
        model=run.parts.model,
        flat=run.parts.flat,
        optimizer=run.parts.optimizer,
        batches=run.parts.feed.train_batches(first_step, run.times.total_steps),
        objective=run.parts.objective,
        learning_rate=run.times.learning_rate,
        comm=comm,
        precision=run.parts.precision,
        total_steps=run.times.total_steps,
        global_batch=run.global_batch,
        first_step=first_step,
        slice_bytes=int(run.comm.slice_mib * 2**20),
        travel=TRAVEL[run.comm.gradients],
        leaves=run.global_batch // plan.micro_batch if run.parts.precision.reproducible else None,
        bad_steps=run.bad_steps,
        graph=graph.chosen(run.graph, run.parts.precision, run.parts.optimizer, comm)[0],
        mix=run.mix,
        # What comes after the last step is never trained on, and stands before the first.
        before=lambda: run.parts.feed.step(first_step - 1 if first_step else run.times.total_steps),
        hooks=after_steps,
    )


def _hooks(
    run: Run,
    progress: Progress,
    log: metrics.MetricLog | None,
    scores: hooks.Evaluate,
    saving: hooks.SaveCheckpoints | None,
    times: RankTimes,
) -> list[Hook]:
    """In the order in which they act: a checkpoint is written after what is said of its step."""
    found: list[Hook] = [hooks.Log(run.log_every, progress, log, run.times.steps_per_epoch, saving), times]
    if run.parts.feed.test is not None:
        found.append(scores)
        if run.folder and saving and run.keep_best:
            found.append(hooks.KeepBest(run.folder / "best", run.parts.about, scores, saving.writer))
    found += run.own_hooks
    if saving:
        found.append(saving)
    return [*found, hooks.StopOnSignal(saving)]


def rank_times(run: Run, comm: Communicator, step: int, say: Callable[[str], object]) -> RankTimes:
    """Where each rank's time goes from `step` on, and which one is late; `say`: a line for people. All call it."""
    parts, feed, dtype = run.parts, run.parts.feed, run.parts.precision.compute_dtype
    size, keys = feed.train_transform.size, "train." if isinstance(feed.config, DataConfig) else ""
    known = setting(comm, parts.precision.device, threads=feed.config.threads, keys=keys, network=parts.network,
                    images=feed.plan.micro_batch * len(feed.plan.mine), size=size, recompute=parts.recompute,
                    dtype=str(dtype).removeprefix("torch."))  # fmt: skip
    counted = partial(moved_bytes_per_image, parts.network, size, dtype, parts.recompute)
    moved = None if family.is_timm(parts.network) else counted
    starting = launching_seconds(parts.model, parts.precision) * len(feed.plan.mine)
    return RankTimes(known, comm, step, run.folder, parts.flat.grads, launching=starting, say=say, moved_bytes=moved)


def _newest(run: Run, comm: Communicator) -> tuple[checkpoint.Checkpoint | None, str]:
    """The checkpoint to go on from, and what was passed over, for people.

    UserError on all ranks where the folder is another run's, or should be new and is not. Rank 0 compares checksums.
    """
    if run.folder is None:
        return None, ""
    folder, found, name, said = run.folder / "checkpoints", None, None, ""
    with comm.together():
        if comm.leads:
            there = places.complete(folder)
            if there and run.resume == "never":
                raise UserError(
                    f"{run.folder} holds checkpoints up to {there[-1].name}; choose another folder=…, or resume=auto"
                )
            places.tidy(folder)
            found, damaged = checkpoint.newest_sound(folder, run.parts.about)
            name = None if found is None else found.path.name
            passed = [f"{path} is damaged, {why}: it is now {places.set_aside(path).name}" for path, why in damaged]
            said = "\n".join(passed)
    name = comm.exchange(name)[0]
    with comm.together():
        if name is not None and not comm.leads:
            found = checkpoint.load(folder / name)
        if found is not None and run.parts.precision.reproducible:
            reproducible.check_resumed(found.about, run.parts.about, found.path)
    return found, said


@contextmanager
def _alone_in(folder: Path | None, comm: Communicator) -> Iterator[Lock | None]:
    """Holds the lock of a run's folder, on rank 0. SharedError on all ranks where another run holds it."""
    lock = None
    if folder is not None and comm.leads:
        lock = Lock(folder / "lock", str(folder), "wait for it, end it, or choose another folder=…")
    with comm.together():
        if lock:
            lock.take()
            watchdog.share(folder)
    if not lock:
        watchdog.share(folder)
    try:
        yield lock
    finally:
        if lock:
            lock.release()


def _introduce(run: Run, comm: Communicator) -> None:
    _, recorded = graph.chosen(run.graph, run.parts.precision, run.parts.optimizer, comm)
    print(run.parts.summary(comm), *filter(None, (run.intro, recorded)), sep="\n", flush=True)


def _keep_surroundings(run: Run, folder: Path, comm: Communicator) -> None:
    """What the run was told and where it ran, beside its results."""
    (folder / "config.yaml").write_text(run.config, encoding="utf-8")
    surroundings = metrics.environment(comm, run.parts.precision.device)
    (folder / "environment.json").write_text(json_text(surroundings, indent=1) + "\n", encoding="utf-8")


def _counted_memory(run: Run) -> str:
    """What the forward pass of a micro-batch will keep, for people: counted on fake tensors, before any is made."""
    plan = run.parts.feed.plan
    images = plan.micro_batch
    size = run.parts.feed.test_transform.size
    sums = tree.waiting(len(plan.mine)) if run.parts.precision.reproducible else 0
    fixed = (12 + 4 * sums) * run.parts.flat.values.numel()  # float32: parameter, gradient, momentum, sums that wait
    each = saved_bytes_per_image(run.parts.network, size, run.parts.precision.compute_dtype, run.parts.recompute)
    return (
        f"counted: {each / 2**20:,.1f} MiB an image kept for the backward pass, {images * each / 2**30:,.2f} GiB for a "
        f"micro-batch of {images}; parameters, gradients{' with sums that wait' if sums else ''} and momentum "
        f"{fixed / 2**30:,.2f} GiB"
    )


def _counted_work(run: Run, size: int, comm: Communicator) -> str:
    """Arithmetic of a step, for people."""
    flops = bit.cost(run.parts.network, run.parts.about["num_classes"], size).training_flops
    each = flops * run.global_batch / comm.size
    return f"{flops / 1e9:.4g} GFLOP per training image; {each / 1e12:.4g} TFLOP a step on each rank"


def _memory_use(device: torch.device) -> str:
    """Largest memory use of this process so far, for people."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU, {host:.2f} GiB on the host"
    return f"{host:.2f} GiB"
