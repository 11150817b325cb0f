"""The steps of a run: epochs turned into steps, and the learning rate of each."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.schema import OptimConfig, ScheduleConfig
from engine.training import schedule


@dataclass(frozen=True)
class Timetable:
    """When what happens, in steps."""

    total_steps: int
    warmup_steps: int
    milestones: tuple[int, ...]
    steps_per_epoch: float  # training samples / global batch: seldom whole
    kind: str
    peak: float  # learning rate after warm-up
    factor: float
    ahead: int = 0  # steps that warm-up is ahead of itself

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return schedule.learning_rate(
            step,
            kind=self.kind,
            peak=self.peak,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            milestones=self.milestones,
            factor=self.factor,
            ahead=self.ahead,
        )

    def describe(self) -> str:
        """The learning rate at the steps where it turns."""
        turns = sorted({0, 1, self.warmup_steps, *self.milestones, self.total_steps // 2, self.total_steps - 1})
        rows = [
            f"  step {step:>8}  epoch {step / self.steps_per_epoch:7.2f}  learning rate {self.learning_rate(step):.6g}"
            for step in turns
            if step < self.total_steps
        ]
        head = f"{self.kind} schedule: {self.total_steps} steps, {self.steps_per_epoch:.2f} an epoch"
        return "\n".join([head, *rows])


def timetable(config: ScheduleConfig, optim: OptimConfig, samples: int, global_batch: int) -> Timetable:
    """The timetable for `samples` training samples. UserError where warm-up and milestones do not fit the length."""
    per_epoch = samples / global_batch
    if config.steps is not None or config.epochs is None:
        assert config.steps is not None, "the schema lets one of the two be none"
        total, milestones = config.steps, tuple(round(m) for m in config.milestones)
    else:
        total = max(1, round(config.epochs * per_epoch))
        milestones = tuple(round(m * per_epoch) for m in config.milestones)
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_epochs * per_epoch)
    peak = schedule.linear_scaling(optim.base_lr, optim.base_batch, global_batch)
    times = Timetable(
        total_steps=total,
        warmup_steps=warmup,
        milestones=milestones if config.kind == "step" else (),
        steps_per_epoch=per_epoch,
        kind=config.kind,
        peak=peak,
        factor=config.factor,
    )
    times.learning_rate(0)  # checks that the parts fit
    return times
