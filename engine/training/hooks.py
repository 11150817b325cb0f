"""What happens beside training: a line or bar of progress, logged metrics, evaluation, checkpoints."""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.comm.communicator import Handle, SharedError, Stopped
from engine.training import checkpoint
from engine.training.metrics import MetricLog, plot_curves
from engine.training.trainer import Trainer

_ADVICE = (
    "Lower the learning rate (optim.base_lr; lr in fine-tuning), lengthen the warm-up (schedule.warmup_epochs), "
    "or train in bf16"
)
VALIDATION_LOSS = "val_loss"  # what the description of a best checkpoint has besides


class Progress:
    """Says where a run is: a bar on a terminal, a line per logged step elsewhere. Rank 0 only."""

    def __init__(self, first_step: int, total_steps: int, global_batch: int, speaks: bool) -> None:
        self._first, self._total, self._batch, self._speaks = first_step, total_steps, global_batch, speaks
        self._start = time.perf_counter()
        self._bar = tqdm(
            total=total_steps * global_batch,
            initial=first_step * global_batch,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (speaks and sys.stderr.isatty()),
        )

    def advance(self, images: int) -> None:
        self._bar.update(images)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """The newest training metrics."""
        if not self._bar.disable:
            self._bar.set_postfix(step=step, loss=f"{values['loss']:.4f}", lr=f"{values['learning_rate']:.2g}")
        elif self._speaks:
            each = (time.perf_counter() - self._start) / max(step - self._first, 1)
            left = timedelta(seconds=round(each * (self._total - step)))
            print(
                f"step {step}/{self._total}  loss {values['loss']:.4f}  lr {values['learning_rate']:.4g}  "
                f"{values['images_per_second']:.0f} images/s  data wait {values['data_wait']:.0%}  left {left}",
                flush=True,
            )

    def say(self, text: str) -> None:
        """A line for people."""
        if self._speaks:
            self._bar.write(text, file=sys.stdout) if not self._bar.disable else print(text, flush=True)

    def close(self) -> None:
        self._bar.close()


class Log:
    """Reads the meter every `every` steps: the only steps that wait for the device."""

    def __init__(
        self,
        every: int,
        progress: Progress,
        metrics: MetricLog | None,
        steps_per_epoch: float,
        checkpoints: SaveCheckpoints | None = None,
    ) -> None:
        self._every, self._progress, self._metrics = every, progress, metrics
        self._steps_per_epoch, self._checkpoints = steps_per_epoch, checkpoints
        self._not_finite = 0

    def after_step(self, trainer: Trainer) -> None:
        self._progress.advance(trainer.global_batch)
        if trainer.step % self._every and trainer.step != trainer.total_steps:
            return
        values = trainer.meter.read(trainer.comm, trainer.global_batch)
        values["learning_rate"] = trainer.optimizer.param_groups[0]["lr"]
        values["epoch"] = trainer.step / self._steps_per_epoch
        if trainer.scaler.is_enabled():
            values["loss_scale"] = trainer.scaler.get_scale()
        self._progress.report(trainer.step, values)
        if self._metrics:
            self._metrics.write("train", trainer.step, values)
        self._stop_if_diverged(trainer, values["loss"])

    def _stop_if_diverged(self, trainer: Trainer, loss: float) -> None:
        # With loss scaling a step may overflow and be skipped; twice in a row is another matter.
        self._not_finite = 0 if math.isfinite(loss) else self._not_finite + 1
        if self._not_finite > int(trainer.scaler.is_enabled()):
            reason = f"the loss is {loss} at step {trainer.step}"
            kept = self._checkpoints.diagnose(trainer, reason) if self._checkpoints else "no folder=… keeps checkpoints"
            raise SharedError(f"{reason}; {kept}. {_ADVICE}")

    def finish(self, trainer: Trainer) -> None:
        self._progress.close()


class Evaluate:
    """Scores the network at the end of each `every` epochs and of the run; keeps the curves up to date."""

    def __init__(
        self,
        evaluate: Callable[[], dict[str, float]],
        every_steps: float,
        progress: Progress,
        metrics: MetricLog | None,
        title: str,
        checkpoints: SaveCheckpoints | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._evaluate, self._every, self._progress = evaluate, every_steps, progress
        self._metrics, self._title = metrics, title
        self.newest: dict[str, float] = {}

    def after_step(self, trainer: Trainer) -> None:
        if crossed(trainer.step, self._every) or trainer.step == trainer.total_steps:
            self.evaluate(trainer)

    def evaluate(self, trainer: Trainer) -> None:
        """Score the network now."""
        with trainer.meter.paused():
            try:
                self.newest = self._evaluate()
            except SharedError as error:  # the loss is no number: on all ranks
                if self._checkpoints is None or not trainer.sample_ids:
                    raise
                raise SharedError(f"{error}; {self._checkpoints.diagnose(trainer, str(error))}") from error
        self._progress.say(f"step {trainer.step}: {describe(self.newest)}")
        if self._metrics:
            self._metrics.write("val", trainer.step, self.newest)
            plot_curves(self._metrics.path, self._metrics.path.with_name("curves.png"), self._title)

    def finish(self, trainer: Trainer) -> None:
        """Nothing left to do: the last step was evaluated."""


class SaveCheckpoints:
    """Writes a checkpoint at each multiple of each interval (in steps), and at the end of the run. Rank 0 writes.

    A checkpoint is finite, or it is not written: what is not finite ends the run on all ranks, and is set beside.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], keep: int, intervals: Sequence[float]) -> None:
        self._folder, self._about, self._keep, self._intervals = folder, dict(about), keep, tuple(intervals)
        self._newest = -1  # step

    def after_step(self, trainer: Trainer) -> None:
        due = any(crossed(trainer.step, interval) for interval in self._intervals)
        if due or trainer.step == trainer.total_steps:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint now, unless this step has one. All ranks call it."""
        if trainer.step == self._newest:
            return
        with trainer.meter.paused():
            bad = trainer.comm.sum_(torch.tensor([float(not trainer.finite())]), "finite").item()
            if bad:
                where = f"on {bad:.0f} of {trainer.comm.size} ranks"
                reason = f"weights or momentum are not finite at step {trainer.step} {where}"
                raise SharedError(f"{reason}; {self.diagnose(trainer, reason)}. {_ADVICE}")
            if trainer.comm.leads:
                checkpoint.save(self._folder, trainer.model, trainer.state(), self._described(trainer), self._keep)
        self._newest = trainer.step

    def diagnose(self, trainer: Trainer, reason: str) -> str:
        """Set the state of a run that diverged beside the checkpoints; what is kept, for people. All ranks call it."""
        ids = trainer.comm.gather(torch.cat(trainer.sample_ids).cpu().numpy(), "diverged").tolist()
        each = len(ids) // trainer.comm.size
        found = checkpoint.complete(self._folder)
        kept = f"{found[-1]} is kept, the newest before it" if found else "there is no checkpoint before it"
        if not trainer.comm.leads:
            return kept
        weights = trainer.model.state_dict().items()
        diagnosis = {
            "reason": reason,
            "not_finite": [name for name, value in weights if not checkpoint.finite([value])],
            "samples": [ids[rank * each : (rank + 1) * each] for rank in range(trainer.comm.size)],
        }
        try:
            beside = checkpoint.set_beside(
                self._folder, trainer.model, trainer.state(), self._described(trainer), diagnosis
            )
        except OSError as error:
            return f"{kept}; what it came to could not be set beside ({error})"
        return f"{kept}; {beside} holds what it came to, with the samples of its last step, and no run goes on from it"

    def _described(self, trainer: Trainer) -> dict[str, Any]:
        return self._about | {"step": trainer.step, "images": trainer.step * trainer.global_batch}

    def finish(self, trainer: Trainer) -> None:
        """Nothing left to do: the last step was saved."""


class KeepBest:
    """Keeps the checkpoint with the least validation loss in a folder of its own; acts after `Evaluate`. Rank 0 writes.

    What an earlier part of the run left there counts, so a resumed run keeps what an uninterrupted one would.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], scores: Evaluate) -> None:
        self._folder, self._about, self._scores = folder, dict(about), scores
        self._seen: dict[str, float] = scores.newest
        losses = [checkpoint.describe(path).get(VALIDATION_LOSS) for path in checkpoint.complete(folder)]
        self._least = min((loss for loss in losses if loss is not None), default=math.inf)

    def after_step(self, trainer: Trainer) -> None:
        if self._scores.newest is self._seen:
            return  # no evaluation since
        self._seen = self._scores.newest
        loss = self._seen["loss"]
        if not loss < self._least:  # NaN is never best
            return
        self._least = loss
        if not trainer.comm.leads:
            return
        with trainer.meter.paused():
            older = checkpoint.complete(self._folder)
            done = {"step": trainer.step, "images": trainer.step * trainer.global_batch, VALIDATION_LOSS: loss}
            kept = checkpoint.save(self._folder, trainer.model, trainer.state(), self._about | done, len(older) + 1)
            for path in older:
                if path != kept:
                    shutil.rmtree(path)

    def finish(self, trainer: Trainer) -> None:
        """Nothing left to do: the last evaluation was looked at."""


class StopOnSignal:
    """Ends training in good order, with a checkpoint where there is a place for one, after SIGUSR1 reached any rank.

    Schedulers send it ahead of a time limit (`--signal=USR1@300`), and not to all ranks at the same step. So the ranks
    add up who has heard it, `every` steps, and look at the sum `every` steps later: none waits for another.
    """

    def __init__(self, checkpoints: SaveCheckpoints | None, every: int = 5) -> None:
        self._checkpoints, self._every = checkpoints, every
        self._heard = False
        self._sum: tuple[torch.Tensor, Handle] | None = None
        signal.signal(signal.SIGUSR1, self._hear)  # and never back: the default would kill a run that is just ending

    def _hear(self, number: int, frame: object) -> None:
        self._heard = True

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step % self._every or trainer.step == trainer.total_steps:
            return
        if self._sum is not None:
            total, handle = self._sum
            handle.wait()
            if total.item():
                self._stop(trainer)
        total = torch.tensor([float(self._heard)])
        self._sum = (total, trainer.comm.start_sum_(total, "stop"))

    def _stop(self, trainer: Trainer) -> None:
        if self._checkpoints:
            self._checkpoints.save(trainer)
        # A launcher may end all ranks once one has exited: none leaves before the checkpoint is whole.
        trainer.comm.sum_(torch.zeros(1), "stopped")
        kept = "with a checkpoint; the same command goes on from there"
        if not self._checkpoints:
            kept = "without a checkpoint, for no folder=… is set; the same command starts anew"
        raise Stopped(f"stopped by SIGUSR1 at step {trainer.step} of {trainer.total_steps}, {kept}")

    def finish(self, trainer: Trainer) -> None:
        if self._sum is not None:
            self._sum[1].wait()


def crossed(step: int, interval: float) -> bool:
    """Whether a multiple of `interval` (steps, not always whole) was reached by this step and not the one before."""
    return math.floor(step / interval) > math.floor((step - 1) / interval)


def describe(scores: Mapping[str, float]) -> str:
    """Scores for people."""
    auc = "mean AUC {:.2f}%" + (f" over {scores['auc_classes']} labels" if "auc_classes" in scores else "")
    names = {"top1": "top-1 {:.2f}%", "mean_auc": auc, "loss": "loss {:.4f}", "images": "{:.0f} images"}
    return ", ".join(names[key].format(scores[key]) for key in names if key in scores)
