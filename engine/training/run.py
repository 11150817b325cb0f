"""A run, from its parts to its last step: what pre-training and fine-tuning have in common."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.comm.communicator import Communicator
from engine.comm.device import refuse_shared_gpus
from engine.network import bit, weights
from engine.network.memory import saved_bytes_per_image
from engine.training import assemble, checkpoint, hooks, metrics
from engine.training.timetable import Timetable
from engine.training.trainer import Hook, Mix, Trainer, unmixed
from engine.whole import json_text
from loaders.errors import UserError


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
    slice_bytes: int  # of gradients that travel at once
    mix: Mix = unmixed
    keep_best: bool = False  # besides, the checkpoint with the least validation loss, in the folder's "best"
    intro: str = ""  # a line for people, after what the parts are

    @property
    def global_batch(self) -> int:
        """Images in a step, over all ranks and micro-batches."""
        return self.parts.feed.plan.global_batch


def train(run: Run, comm: Communicator, *, quiet: bool = False) -> dict[str, float]:
    """Train to the last step, from the newest checkpoint where there is one; the scores of the last evaluation.

    `quiet`: without a word. UserErrors come together on all ranks; Stopped where a signal ended the run before.
    """
    speaks = comm.leads and not quiet
    refuse_shared_gpus(run.parts.precision.device, comm)
    newest, passed_over = _newest(run, comm)
    step = 0 if newest is None else newest.state["step"]
    progress = hooks.Progress(step, run.times.total_steps, run.global_batch, speaks)
    log = metrics.MetricLog(run.folder) if run.folder and comm.leads else None
    saving = None
    if run.folder:
        saving = hooks.SaveCheckpoints(run.folder / "checkpoints", run.parts.about, run.keep, run.save_every)
    scores = hooks.Evaluate(lambda: run.parts.evaluate(comm), run.eval_every, progress, log, run.title, saving)
    with comm.together():
        acts = _hooks(run, progress, log, scores, saving)
    trainer = _trainer(run, comm, step, acts)
    with comm.together():
        if newest is not None:
            weights.apply(run.parts.model, newest.weights, new_head=False)
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
    if step == run.times.total_steps:
        scores.evaluate(trainer)
    trainer.fit()
    if log:
        log.close()
    return scores.newest


def rehearse(run: Run, comm: Communicator) -> None:
    """Two steps, and what they show of the run. Writes nothing."""
    refuse_shared_gpus(run.parts.precision.device, comm)
    trainer = _trainer(run, comm, 0, [])
    run.parts.broadcast(comm)
    if comm.leads:
        _introduce(run, comm)
        print(_counted_memory(run, comm), flush=True)
    for _ in range(2):
        micro_batches = next(trainer.batches)
        trainer.train_step(micro_batches)
    shape = tuple(micro_batches[0].images.shape)
    reading = trainer.meter.read(comm, trainer.global_batch)
    if comm.leads:
        print(f"micro-batch {shape}, {len(micro_batches)} of them a step on each rank; two steps: "
              f"loss {reading['loss']:.4f}; peak memory {_memory_use(run.parts.precision.device)}")  # fmt: skip
        flops = bit.cost(run.parts.network, run.parts.about["num_classes"], shape[-1]).training_flops
        print(f"{flops / 1e9:.4g} GFLOP per training image; "
              f"{flops * trainer.global_batch / comm.size / 1e12:.4g} TFLOP a step on each rank")  # fmt: skip
        print(run.times.describe())


def _trainer(run: Run, comm: Communicator, first_step: int, after_steps: list[Hook]) -> Trainer:
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
        slice_bytes=run.slice_bytes,
        mix=run.mix,
        hooks=after_steps,
    )


def _hooks(
    run: Run,
    progress: hooks.Progress,
    log: metrics.MetricLog | None,
    scores: hooks.Evaluate,
    saving: hooks.SaveCheckpoints | None,
) -> list[Hook]:
    """In the order in which they act: a checkpoint is written after what is said of its step."""
    found: list[Hook] = [hooks.Log(run.log_every, progress, log, run.times.steps_per_epoch, saving)]
    if run.parts.feed.test is not None:
        found.append(scores)
        if run.folder and run.keep_best:
            found.append(hooks.KeepBest(run.folder / "best", run.parts.about, scores))
    if saving:
        found.append(saving)
    return [*found, hooks.StopOnSignal(saving)]


def _newest(run: Run, comm: Communicator) -> tuple[checkpoint.Checkpoint | None, str]:
    """The checkpoint to go on from, and what was passed over, for people.

    UserError on all ranks where the folder is another run's, or should be new and is not. Rank 0 compares checksums.
    """
    if run.folder is None:
        return None, ""
    folder, found, name, said = run.folder / "checkpoints", None, None, ""
    with comm.together():
        if comm.leads:
            there = checkpoint.complete(folder)
            if there and run.resume == "never":
                raise UserError(
                    f"{run.folder} holds checkpoints up to {there[-1].name}; choose another folder=…, or resume=auto"
                )
            checkpoint.tidy(folder)
            found, damaged = checkpoint.newest_sound(folder, run.parts.about)
            name = None if found is None else found.path.name
            passed = [f"{path} is damaged, {why}: it is now {checkpoint.set_aside(path).name}" for path, why in damaged]
            said = "\n".join(passed)
    name = comm.exchange(name)[0]
    with comm.together():
        if name is not None and not comm.leads:
            found = checkpoint.load(folder / name)
    return found, said


def _introduce(run: Run, comm: Communicator) -> None:
    print(run.parts.summary(comm), *([run.intro] if run.intro else []), sep="\n", flush=True)


def _keep_surroundings(run: Run, folder: Path, comm: Communicator) -> None:
    """What the run was told and where it ran, beside its results."""
    (folder / "config.yaml").write_text(run.config)
    surroundings = metrics.environment(comm, run.parts.precision.device)
    (folder / "environment.json").write_text(json_text(surroundings, indent=1) + "\n")


def _counted_memory(run: Run, comm: Communicator) -> str:
    """What the forward pass of a micro-batch will keep, for people: counted on fake tensors, before any is made."""
    plan = run.parts.feed.plan
    images = plan.global_batch // comm.size // plan.accumulate
    size = run.parts.feed.test_transform.size
    fixed = 12 * run.parts.flat.values.numel()  # float32: parameter, gradient, momentum
    each = saved_bytes_per_image(run.parts.network, size, run.parts.precision.compute_dtype)
    return (
        f"counted: {each / 2**20:,.1f} MiB an image kept for the backward pass, {images * each / 2**30:,.2f} GiB for a "
        f"micro-batch of {images}; parameters, gradients and momentum {fixed / 2**30:,.2f} GiB"
    )


def _memory_use(device: torch.device) -> str:
    """Largest memory use of this process so far, for people."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU, {host:.2f} GiB on the host"
    return f"{host:.2f} GiB"
