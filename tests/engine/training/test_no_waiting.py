"""No part of a step makes the host wait for the device: seen on fake CUDA tensors, which need none.

Autograd runs no backward pass on them; what a whole step does on a GPU is in tests/test_gpu.py.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.network import bit
from engine.network.memory import autocast
from engine.optim import AgcSgd, named_groups
from engine.optim.flat import FlatParameters
from engine.training import objective
from engine.training.precision import Precision
from engine.training.trainer import Trainer
from loaders.pipelines.batches import Batch
from tests.support.waits import Waits

LABELS = {
    "classes": (np.zeros(1, np.int64), lambda: torch.zeros(8, dtype=torch.int64)),
    "vectors": (np.zeros((1, 5), np.float32), lambda: torch.empty(8, 5)),
}


class Cast(Precision):
    """torch.autocast switches itself off on a machine without a GPU."""

    def autocast(self):
        return autocast(torch.bfloat16)


@pytest.mark.parametrize("kind", LABELS)
def test_forward_loss_and_what_follows_backward(kind):
    of_pack, labels = LABELS[kind]
    with FakeTensorMode():
        with torch.device("cuda"):
            model = bit.build("R8x0.25-8px", 5)
            images, labels, ids = torch.empty(8, 3, 8, 8), labels(), torch.arange(8)
        flat = FlatParameters(model, channels_last=True)
        trainer = Trainer(
            model=model,
            flat=flat,
            optimizer=AgcSgd(named_groups(model, 1e-4, "none"), lr=0.1, implementation="foreach"),
            batches=iter(()),
            objective=objective.choose(of_pack),
            learning_rate=lambda step: 0.1 / (1 + step),
            comm=Communicator(Launch("alone")),
            precision=Cast("bf16", torch.device("cuda")),
            total_steps=2,
            global_batch=8,
        )
        batch = Batch(images, labels, ids, torch.ones_like(ids, dtype=torch.bool))
        with Waits() as waits:
            trainer._set_learning_rate()
            flat.count.zero_()
            loss = trainer._forward(batch)
            trainer._average_over_known_labels()
            trainer.optimizer.step()
        assert loss.device.type == "cuda"
        assert loss.dtype == torch.float32
        assert waits.seen > 100
        assert waits.found == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.new_tensor(3.0),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: x.nonzero(),
    ],
)
def test_what_waits_is_seen(wait):
    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
        with Waits() as waits:
            try:
                wait(x)
            except Exception as error:  # fake tensors have no numbers to give
                assert "DataDependent" in type(error).__name__ or "Dynamic" in type(error).__name__, error
                return
        assert waits.found


def test_copies_that_do_not_wait_are_not_reported():
    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
        with Waits() as waits:
            x.to("cpu", non_blocking=True)
            x.copy_(torch.zeros(3), non_blocking=True)
            x.to(torch.float16).add_(1)
            x.new_full((), 3.0)
        assert waits.found == []
