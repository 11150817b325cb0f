"""A step's work on the device as one CUDA graph: recorded once, and started by one launch from then on.

The host then has nothing to issue but the copies of a batch, so small batches and small networks no longer wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.comm.communicator import Communicator
from engine.optim.agc_sgd import AgcSgd
from engine.training.precision import Precision
from loaders.errors import UserError
from loaders.pipelines.batches import Batch

Work = Callable[[Sequence[Batch]], None]
EAGER_STEPS = 3
"""Before the recording: algorithms are chosen, tables are made, memory is found."""


def why_not(precision: Precision, optimizer: AgcSgd, comm: Communicator) -> str | None:
    """Why a training step cannot be recorded, None if it can."""
    if precision.device.type != "cuda":
        return "it is for GPUs"
    if precision.reproducible:
        return "steps are to be reproducible on several ranks, which add sums between launches"
    if precision.name == "fp16":
        return "in fp16 the host decides on each step's loss scale"
    if optimizer.implementation != "fused":
        return "the foreach optimizer reads its settings on the host"
    if comm.size > 1 and not comm.sums_in_graphs:
        return f"{comm.name} sums outside of CUDA's streams"
    return None


def chosen(wanted: str, precision: Precision, optimizer: AgcSgd, comm: Communicator) -> tuple[bool, str]:
    """Whether steps are recorded, as `train.graph` wants it, and why not, for people; empty where nobody asks.

    UserError where it must be and cannot.
    """
    reason = why_not(precision, optimizer, comm)
    if wanted == "on" and reason:
        raise UserError(f"train.graph=on: a step cannot be recorded, for {reason}; say auto or off")
    if wanted == "auto" and not reason and comm.size > 1:
        reason = "with several ranks only where train.graph=on asks for it"
    if wanted == "off" or precision.device.type != "cuda":
        return False, ""
    return not reason, f"no CUDA graph: {reason}" if reason else "each step is one CUDA graph"


class RecordedStep:
    """Does `work` on micro-batches: as it is for the first steps and for batches of another shape, else by the graph.

    All parameter groups have one learning rate, which the graph reads from the device.
    record: makes of a call what does its device work again; by default a CUDA graph.
    """

    def __init__(
        self, work: Work, optimizer: AgcSgd, record: Callable[[Callable[[], None]], Callable[[], None]] | None = None
    ) -> None:
        self._work, self._optimizer = work, optimizer
        self._record = record or _cuda_graph
        self._static: list[Batch] = []
        self._replay: Callable[[], None] | None = None
        self._eager = 0
        self._rate = torch.zeros((), device=next(iter(optimizer.param_groups[0]["params"])).device)

    def __call__(self, micro_batches: Sequence[Batch]) -> None:
        if self._replay is None and self._eager < EAGER_STEPS:
            self._eager += 1
            self._work(micro_batches)
            return
        self._rate.fill_(self._optimizer.param_groups[0]["lr"])  # a kernel with the number as its argument
        if self._replay is None:
            self._static = [Batch(*(tensor.clone() for tensor in batch)) for batch in micro_batches]
            self._replay = self._recorded()
        elif _shapes(micro_batches) != _shapes(self._static):
            self._work(micro_batches)
            return
        for place, batch in zip(self._static, micro_batches, strict=True):
            for into, tensor in zip(place, batch, strict=True):
                into.copy_(tensor, non_blocking=True)
        self._replay()

    def _recorded(self) -> Callable[[], None]:
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate
        try:
            return self._record(lambda: self._work(self._static))
        finally:
            for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                group["lr"] = rate


def _shapes(micro_batches: Sequence[Batch]) -> list[list[Any]]:
    return [[(tensor.shape, tensor.dtype, tensor.stride()) for tensor in batch] for batch in micro_batches]


def _cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # Threads that decode and upload go on meanwhile, and what they ask of CUDA must not end the recording.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay
