"""The training step, and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from engine.comm.communicator import Communicator
from engine.optim.agc_sgd import AgcSgd
from engine.optim.flat import FlatParameters, GradientSum
from engine.training import checkpoint
from engine.training.objective import Objective
from engine.training.precision import Precision
from loaders.pipelines.batches import Batch

Mix = Callable[[int, Batch], tuple[torch.Tensor, torch.Tensor]]


class Hook(Protocol):
    """Something that happens beside training. All ranks call all hooks, in the same order."""

    def after_step(self, trainer: Trainer) -> None: ...

    def finish(self, trainer: Trainer) -> None: ...


def unmixed(step: int, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels as they came."""
    return batch.images, batch.labels


class Trainer:
    """Trains `model` up to `total_steps`; `step` is the number of completed steps.

    batches: gives each step's micro-batches of this rank, from step `first_step` on.
    learning_rate: step → learning rate.
    mix: (step, batch) → images and labels, or images and class probabilities.
    slice_bytes: how much of the gradients travels at once.
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
        mix: Mix = unmixed,
        hooks: Sequence[Hook] = (),
    ) -> None:
        self.model, self.flat, self.optimizer, self.batches = model, flat, optimizer, batches
        self.objective, self.mix, self.learning_rate = objective, mix, learning_rate
        self.comm, self.precision, self.hooks = comm, precision, hooks
        self.step, self.total_steps, self.global_batch = first_step, total_steps, global_batch
        self.labels_per_step = global_batch * objective.labels_per_image
        self.gradients = GradientSum(flat, comm, slice_bytes)
        self.scaler = precision.scaler()
        self.meter = Meter(flat.values.device)
        self.sample_ids: list[torch.Tensor] = []  # of this rank's micro-batches in the newest step

    def fit(self) -> None:
        """Train to the last step, then let the hooks finish."""
        self.model.train()
        while self.step < self.total_steps:
            with self.meter.waiting():
                micro_batches = next(self.batches)
            self.train_step(micro_batches)
            for hook in self.hooks:
                hook.after_step(self)
        for hook in self.hooks:
            hook.finish(self)

    def train_step(self, micro_batches: Sequence[Batch]) -> None:
        """One step on this rank's share of a global batch. Nothing in it waits for the device."""
        self._set_learning_rate()
        self.sample_ids = [batch.ids for batch in micro_batches]
        self.flat.zero_grads()
        for index, batch in enumerate(micro_batches):
            loss = self._forward(batch)
            with self.gradients.during_backward(communicate=index == len(micro_batches) - 1):
                self.scaler.scale(loss).backward()
        self._average_over_known_labels()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.meter.count_step()

    def _set_learning_rate(self) -> None:
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _forward(self, batch: Batch) -> torch.Tensor:
        images, labels = self.mix(self.step, batch)
        with self.precision.autocast():
            logits = self.model(images)
        total, count = self.objective.loss(logits.float(), labels)
        self.flat.count += count
        self.meter.add(total, count)
        return total / self.labels_per_step

    def _average_over_known_labels(self) -> None:
        # The loss was divided by the labels of a global batch in which all are known. How many are came along with
        # the gradients. One label per image is always known: there the quotient would be 1.
        if self.objective.masked:
            self.flat.grads.mul_(self.labels_per_step / self.flat.count.clamp(min=1.0))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the weights: tensors, numbers, and containers of them."""
        return {"step": self.step, "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

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


class Meter:
    """Loss, speed, and time spent waiting for data between two readings. The loss is summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, device=device)
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

    def add(self, total: torch.Tensor, count: torch.Tensor | int) -> None:
        """Add a sum of losses over `count` labels."""
        self._sums[0] += total.detach()
        self._sums[1] += count

    def count_step(self) -> None:
        self._steps += 1

    def read(self, comm: Communicator, global_batch: int) -> dict[str, float]:
        """Mean loss over all ranks, images per second, and the share of time waited for data; then start anew.

        The one place where training waits for the device and for the other ranks' numbers.
        """
        total, count = comm.sum_(self._sums, "meter").tolist()
        seconds = time.perf_counter() - self._start
        reading = {
            "loss": total / max(count, 1.0),
            "images_per_second": self._steps * global_batch / seconds,
            "data_wait": self._waited / seconds,
        }
        self._reset()
        return reading
