"""The training step, and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from engine.comm.communicator import Communicator
from engine.monitoring.stopwatch import Stopwatch
from engine.optim.agc_sgd import AgcSgd
from engine.optim.flat import FlatParameters
from engine.optim.gradients import GradientSum
from engine.optim.tree import TreeSum
from engine.saving import checkpoint, watchdog
from engine.saving.bad_steps import BadSteps
from engine.training import reproducible
from engine.training.graph import RecordedStep, Work
from engine.training.objective import Objective
from engine.training.precision import Precision
from loaders.pipelines.batches import Batch

Mix = Callable[[int, Batch, Batch], tuple[torch.Tensor, torch.Tensor]]


class Hook(Protocol):
    """Something that happens beside training. All ranks call all hooks, in the same order."""

    def after_step(self, trainer: Trainer) -> None: ...

    def finish(self, trainer: Trainer) -> None: ...


class Trainer:
    """Trains `model` up to `total_steps`; `step` is the number of completed steps.

    batches: gives each step's micro-batches of this rank, from step `first_step` on.
    learning_rate: step → learning rate.
    mix: (step, batch, the one that had its place in the step before) → images and class probabilities, for MixUp.
    bad_steps: in a row that may be skipped, since their gradients are not finite.
    before: gives the micro-batches that come before the first step's, for `mix`.
    graph: the device's work is recorded as a CUDA graph; see `graph.why_not`.
    slice_bytes, travel: how much of the gradients travels at once, and as what: see `GradientSum`.
    leaves: micro-batches of a step over all ranks, where they are to be summed in one tree: see `TreeSum`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        flat: FlatParameters,
        optimizer: AgcSgd,
        batches: Iterator[Sequence[Batch]],
        objective: Objective,
        learning_rate: Callable[[int], float],
        comm: Communicator,
        precision: Precision,
        total_steps: int,
        global_batch: int,
        first_step: int = 0,
        slice_bytes: int = 32 * 2**20,
        travel: torch.dtype = torch.float32,
        leaves: int | None = None,
        mix: Mix | None = None,
        before: Callable[[], Sequence[Batch]] = lambda: (),
        bad_steps: int = 0,
        graph: bool = False,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.model, self.flat, self.optimizer, self.batches = model, flat, optimizer, batches
        self.objective, self.learning_rate = objective, learning_rate
        self.mix, self._first_before = mix, before
        self._before: Sequence[Batch] = ()
        self.comm, self.precision, self.hooks = comm, precision, hooks
        self.step, self.total_steps, self.global_batch = first_step, total_steps, global_batch
        self.labels_per_step = global_batch * objective.labels_per_image
        self.reproducible = leaves is not None
        how = flat, comm, slice_bytes, travel
        self.gradients = GradientSum(*how) if leaves is None else TreeSum(*how, leaves)
        self.scaler = precision.scaler()
        self.bad_steps = BadSteps(flat.values.device, bad_steps)
        self.meter = Meter(flat.values.device)
        self.phases = Stopwatch(flat.values.device)
        self._slow = True  # the first step: buffers are made, kernels are chosen, files are opened
        self._work: Work = RecordedStep(self._on_device, optimizer) if graph else self._on_device
        self.sample_ids: list[torch.Tensor] = []  # of this rank's micro-batches in the newest step

    def fit(self) -> None:
        """Train to the last step, then let the hooks finish."""
        self.model.train()
        while self.step < self.total_steps:
            self._passed("waiting for data")
            self.phases.start()
            with self.meter.waiting():
                micro_batches = next(self.batches)
            self.phases.lap("input")
            self.train_step(micro_batches)
            for hook in self.hooks:
                self._passed(f"after the step, {type(hook).__name__}")
                hook.after_step(self)
            self._slow = False
        for hook in self.hooks:
            hook.finish(self)

    def train_step(self, micro_batches: Sequence[Batch]) -> None:
        """One step on this rank's share of a global batch. Nothing in it waits for the device."""
        self._set_learning_rate()
        self.sample_ids = [batch.ids for batch in micro_batches]
        with reproducible.told() if self.reproducible else nullcontext():
            self._work(self._mixed(micro_batches) if self.mix else micro_batches)
        self.step += 1
        self.bad_steps.note(self.step, self.sample_ids)
        self.meter.count_step()
        self.phases.end_step()

    def _on_device(self, micro_batches: Sequence[Batch]) -> None:
        """All that the device does, from images to new parameters."""
        for index, batch in enumerate(micro_batches):
            # Ranks may have different numbers of micro-batches, one at least.
            self._passed(f"forward and backward pass {index + 1} of {len(micro_batches)}", counts=index == 0)
            last = index == len(micro_batches) - 1
            self.gradients.start(first=index == 0)
            loss = self._forward(batch)
            with self.gradients.during_backward(first=index == 0, last=last):
                self.scaler.scale(loss).backward()
                if last:
                    self.phases.lap("compute")
                    self._passed("summing gradients over the ranks")
        self.phases.lap("wait")
        self._passed("optimizer")
        self.meter.add(self.flat.sums)
        self._average_over_known_labels()
        self._update(self.bad_steps.look(self.flat.grads))
        self.phases.lap("optimizer")

    def _update(self, bad: torch.Tensor) -> None:
        """The optimizer's step, unless it is bad: nothing is changed then."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # skips by itself
            self.scaler.update()
        elif self.optimizer.implementation == "fused":
            self.optimizer.found_inf = bad
            self.optimizer.step()
        elif not bad.item():  # what plain torch has waits for the device
            self.optimizer.step()

    def _passed(self, doing: str, counts: bool = True) -> None:
        watchdog.passed(f"step {self.step}: {doing}", slow=self._slow, counts=counts)

    def _set_learning_rate(self) -> None:
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _mixed(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        assert self.mix is not None
        before, self._before = self._before or self._first_before(), micro_batches
        mixed = [self.mix(self.step, batch, other) for batch, other in zip(micro_batches, before, strict=True)]
        return [
            batch._replace(images=images, labels=labels)
            for batch, (images, labels) in zip(micro_batches, mixed, strict=True)
        ]

    def _forward(self, batch: Batch) -> torch.Tensor:
        with self.precision.autocast():
            logits = self.model(batch.images)
        total, count = self.objective.loss(logits.float(), batch.labels)
        self.flat.count += count
        self.flat.loss += total.detach()
        return total / self.labels_per_step

    def _average_over_known_labels(self) -> None:
        # The loss was divided by the labels of a global batch in which all are known. How many are came along with
        # the gradients. One label per image is always known: there, without weights, the quotient would be 1.
        if self.objective.masked:
            self.flat.grads.mul_(self.labels_per_step / torch.where(self.flat.count > 0, self.flat.count, 1.0))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the weights: tensors, numbers, and containers of them."""
        state = {"step": self.step, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return state | ({"meter": self.meter.sums()} if self.reproducible else {})

    def finite(self) -> bool:
        """Whether weights and momentum, on this rank, are numbers. Waits for the device."""
        momentum = (state.get("momentum_buffer") for state in self.optimizer.state.values())
        return checkpoint.finite([self.flat.values, *(buffer for buffer in momentum if buffer is not None)])

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from the `state()` of another run, of any number of ranks."""
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.reproducible:
            self.meter.add(torch.tensor(state["meter"]).to(self.flat.values.device))


class Meter:
    """Loss, speed, and time spent waiting for data between two readings. The loss is summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, device=device)
        self.newest: dict[str, float] | None = None  # reading
        self._reset()

    def _reset(self) -> None:
        self._sums.zero_()
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Encloses the wait for a batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Encloses what is not training, such as evaluation: it does not count as training time."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def add(self, sums: torch.Tensor) -> None:
        """Add a step's: the number of labels and the sum of their losses, over all ranks, (2,) float32."""
        self._sums += sums

    def sums(self) -> list[float]:
        """What was added since the last reading. Waits for the device."""
        return self._sums.tolist()

    def count_step(self) -> None:
        self._steps += 1

    def read(self, global_batch: int) -> dict[str, float]:
        """Mean loss over all ranks, images per second, and the share of time waited for data; then start anew.

        The one place where training waits for the device.
        """
        count, total = self._sums.tolist()
        seconds = time.perf_counter() - self._start
        reading = {
            "loss": total / (count or 1.0),
            "images_per_second": self._steps * global_batch / seconds,
            "data_wait": self._waited / seconds,
        }
        self._reset()
        self.newest = reading
        return reading
