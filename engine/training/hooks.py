"""What happens beside training: logged metrics, evaluation, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.comm.communicator import Handle, SharedError
from engine.monitoring import curves
from engine.monitoring.metrics import MetricLog
from engine.monitoring.progress import Progress
from engine.optim.clipping import LoggedShares
from engine.saving import checkpoint, places, signals, watchdog
from engine.saving.checkpoint import Weights
from engine.saving.writer import Writer
from engine.training.trainer import Trainer
from engine.whole import may_wait
from loaders.errors import in_words
from loaders.lock import Lock

_ADVICE = (
    "Lower the learning rate (optim.base_lr; lr in fine-tuning), lengthen the warm-up (schedule.warmup_epochs), "
    "or train in bf16"
)
VALIDATION_LOSS = "val_loss"  # what the description of a best checkpoint has besides


class Log:
    """Reads the meter every `every` steps, the only ones that wait for the device; ends a run of bad steps."""

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
        self._shares = LoggedShares()

    def after_step(self, trainer: Trainer) -> None:
        self._progress.advance(trainer.global_batch)
        logged = trainer.step % self._every == 0 or trainer.step == trainer.total_steps
        if logged:
            self._report(trainer)
        bad = trainer.bad_steps.beyond(all_steps=logged)
        if bad is not None:
            reason = f"loss or gradients are not finite at step {bad.step}, {bad.in_a_row} in a row"
            trainer.sample_ids = bad.sample_ids
            kept = self._checkpoints.diagnose(trainer, reason) if self._checkpoints else "no folder=… keeps checkpoints"
            raise SharedError(f"training has diverged: {reason}; {kept}. {_ADVICE}")

    def _report(self, trainer: Trainer) -> None:
        values = trainer.meter.read(trainer.global_batch)
        values["learning_rate"] = trainer.optimizer.param_groups[0]["lr"]
        values["epoch"] = trainer.step / self._steps_per_epoch
        values["skipped_steps"] = trainer.bad_steps.read()
        if trainer.scaler.is_enabled():
            values["loss_scale"] = trainer.scaler.get_scale()
        self._progress.report(trainer.step, values, self._checkpoints.writer.told() if self._checkpoints else "")
        if self._metrics:
            self._metrics.write("train", trainer.step, values | self._shares.of(trainer.optimizer.clipped()))

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
        if log := self._metrics:
            log.write("val", trainer.step, self.newest)
            picture = log.path.with_name("curves.png")
            with may_wait(picture, "it is drawn anew at the next evaluation"):
                curves.plot(log.path, picture, self._title, log.majority)

    def finish(self, trainer: Trainer) -> None:
        """Nothing left to do: the last step was evaluated."""


class SaveCheckpoints:
    """Saves at each multiple of each interval (in steps), and at the end of the run. Rank 0 writes, beside training.

    A checkpoint is finite, or it is not written: what is not finite ends the run on all ranks, and is set beside.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        keep: int,
        intervals: Sequence[float],
        lock: Lock | None,
        writer: Writer,
        metrics: MetricLog | None = None,
    ) -> None:
        self._folder, self._about, self._keep, self._intervals = folder, dict(about), keep, tuple(intervals)
        self._lock = lock  # of the run's folder, on rank 0
        self.writer, self._metrics = writer, metrics
        self._newest = -1  # step that was handed to the writer

    def after_step(self, trainer: Trainer) -> None:
        self._note()
        due = any(crossed(trainer.step, interval) for interval in self._intervals)
        if due or trainer.step == trainer.total_steps:
            self.save(trainer, needed=trainer.step == trainer.total_steps)

    def save(self, trainer: Trainer, needed: bool = True) -> None:
        """Save now, unless this step was. All ranks call it.

        What is not `needed` is written while training goes on; on a full disk it is tried again at the next interval,
        with a warning. One that is needed is waited for, and for want of it all ranks end.
        """
        watchdog.passed(f"saving step {trainer.step}", slow=True)
        with trainer.meter.paused():
            if trainer.step != self._newest:
                self._check(trainer)
                self._hand_over(trainer)
                self._newest = trainer.step
            elif not self.writer.wait():
                self._hand_over(trainer)
            if not needed:
                return
            written = self.writer.wait()
            missed = trainer.comm.sum_(torch.tensor([float(not written)]), "saved").item()
        if missed:
            raise SharedError(f"step {trainer.step} could not be saved in {self._folder}; free some room, and the same "
                              "command goes on from the checkpoint before it")  # fmt: skip

    def _check(self, trainer: Trainer) -> None:
        """SharedError where the weights are not finite, or the place is another run's."""
        lost = float(self._lock is not None and self._lock.lost())
        asked = torch.tensor([float(not trainer.finite()), lost])
        bad, lost = trainer.comm.sum_(asked, "finite").tolist()
        if lost:
            raise SharedError(f"{self._folder.parent} is another run's now: this one had given no sign of life")
        if bad:
            where = f"on {bad:.0f} of {trainer.comm.size} ranks"
            reason = f"weights or momentum are not finite at step {trainer.step} {where}"
            raise SharedError(f"{reason}; {self.diagnose(trainer, reason)}. {_ADVICE}")

    def _hand_over(self, trainer: Trainer) -> None:
        if trainer.comm.leads:
            write = partial(self._write, self._described(trainer))
            self.writer.start(trainer.step, write, trainer.model.state_dict(), trainer.state())

    def _write(self, about: Mapping[str, Any], weights: Weights, state: Mapping[str, Any]) -> bool:
        then = "training goes on, and saves at the next interval"
        return checkpoint.save_or_warn(self._folder, weights, state, about, self._keep, then)

    def _note(self) -> None:
        for saved in self.writer.finished():
            if self._metrics:
                self._metrics.write("save", saved.step, {"stall_s": saved.stall_s, "write_s": saved.write_s})

    def diagnose(self, trainer: Trainer, reason: str) -> str:
        """Set the state of a run that diverged beside the checkpoints; what is kept, for people. All ranks call it."""
        ids = trainer.comm.gather(torch.cat(trainer.sample_ids).cpu().numpy(), "diverged").tolist()
        each = len(ids) // trainer.comm.size
        self.writer.wait()
        found = places.complete(self._folder)
        kept = f"{found[-1]} is kept, the newest before it" if found else "there is no checkpoint before it"
        if not trainer.comm.leads:
            return kept
        weights = trainer.model.state_dict()
        diagnosis = {
            "reason": reason,
            "not_finite": [name for name, value in weights.items() if not checkpoint.finite([value])],
            "samples": [ids[rank * each : (rank + 1) * each] for rank in range(trainer.comm.size)],
        }
        try:
            described = self._described(trainer)
            beside = checkpoint.set_beside(self._folder, weights, trainer.state(), described, diagnosis)
        except OSError as error:
            return f"{kept}; what it came to could not be set beside ({in_words(error)})"
        return f"{kept}; {beside} holds what it came to, with the samples of its last step, and no run goes on from it"

    def _described(self, trainer: Trainer) -> dict[str, Any]:
        return self._about | {"step": trainer.step, "images": trainer.step * trainer.global_batch}

    def finish(self, trainer: Trainer) -> None:
        self._note()  # of the last step


class KeepBest:
    """Keeps the checkpoint with the least validation loss in a folder of its own; acts after `Evaluate`. Rank 0 writes.

    What an earlier part of the run left there counts, so a resumed run keeps what an uninterrupted one would.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], scores: Evaluate, writer: Writer) -> None:
        self._folder, self._about, self._scores, self._writer = folder, dict(about), scores, writer
        self._seen: dict[str, float] = scores.newest
        losses = [checkpoint.describe(path).get(VALIDATION_LOSS) for path in places.complete(folder)]
        self._least = min((loss for loss in losses if loss is not None), default=math.inf)

    def after_step(self, trainer: Trainer) -> None:
        if self._scores.newest is self._seen or not trainer.comm.leads:
            return
        self._seen = self._scores.newest
        loss = self._seen["loss"]
        watchdog.passed(f"saving step {trainer.step} if it is the best", slow=True, counts=False)
        with trainer.meter.paused():
            self._writer.wait()  # the best so far may be under way
            if loss < self._least and trainer.finite():  # NaN is never best
                about = {"step": trainer.step, "images": trainer.step * trainer.global_batch, VALIDATION_LOSS: loss}
                write = partial(self._write, self._about | about)
                self._writer.start(trainer.step, write, trainer.model.state_dict(), trainer.state())

    def _write(self, about: Mapping[str, Any], weights: Weights, state: Mapping[str, Any]) -> bool:
        if not checkpoint.save_or_warn(self._folder, weights, state, about, None, "the best before it is kept"):
            return False
        self._least = about[VALIDATION_LOSS]
        return True

    def finish(self, trainer: Trainer) -> None:
        """Nothing left to do: the last evaluation was looked at."""


class StopOnSignal:
    """Ends training in good order, with a checkpoint where there is a place for one, after a signal to any rank.

    Not all ranks hear it at the same step. So they add up who has heard one, and look at the sum a step later: none
    waits for another.
    """

    def __init__(self, checkpoints: SaveCheckpoints | None) -> None:
        self._checkpoints = checkpoints
        self._sum: tuple[torch.Tensor, Handle] | None = None

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == trainer.total_steps:
            return
        if self._sum is not None:
            total, handle = self._sum
            handle.wait()
            if total.item():
                self._stop(trainer)
        total = torch.tensor([float(signals.heard() is not None)])
        self._sum = (total, trainer.comm.start_sum_(total, "stop"))

    def _stop(self, trainer: Trainer) -> None:
        kept = "with a checkpoint; the same command goes on from there"
        if self._checkpoints:
            self._checkpoints.save(trainer)
        else:
            kept = "without a checkpoint, for no folder=… is set; the same command starts anew"
        # A launcher may end all ranks once one has exited: here all wait until the checkpoint is whole.
        signals.stop_if_heard(trainer.comm, f"at step {trainer.step} of {trainer.total_steps}, {kept}")

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
