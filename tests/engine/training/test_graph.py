"""A recorded step: what is copied where, and that it is the step. The recording is emulated: a call made again."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench.measured.training import Setup, build, images
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.training.graph import EAGER_STEPS, RecordedStep, chosen
from engine.training.precision import Precision
from loaders.errors import UserError

ALONE = Communicator(Launch("alone"))
SETUP = Setup("R8x0.25-8px", batch=4, precision="fp32", device="cpu", size=8, num_classes=5)


def trained(recorded, schedule, sizes=(4,) * 8):
    """Parameters after steps of two micro-batches of these sizes, and what was recorded."""
    trainer, recordings = build(SETUP, ALONE), []
    trainer.model.train()

    def record(work):
        """Nothing runs while it is recorded; what it does again reads the rate that it had then, a tensor."""
        recordings.append(work)
        groups = trainer.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        assert all(isinstance(rate, torch.Tensor) for rate in rates)

        def replay():
            numbers = [group["lr"] for group in groups]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            work()
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number

        return replay

    if recorded:
        trainer._work = RecordedStep(trainer._on_device, trainer.optimizer, record)
    trainer.learning_rate = schedule
    for step, size in enumerate(sizes):
        parts = [images(range(begin, begin + size), SETUP, torch.device("cpu")) for begin in (10 * step, 10 * step + 5)]
        trainer.train_step(parts)
    return trainer.flat.values, recordings


def test_recorded_steps_are_the_steps_on_new_images_at_new_rates():
    eager, none = trained(False, lambda step: 0.1 / (1 + step))
    found, recordings = trained(True, lambda step: 0.1 / (1 + step))
    assert (len(none), len(recordings)) == (0, 1)
    torch.testing.assert_close(found, eager, rtol=1e-6, atol=1e-7)
    other, _ = trained(True, lambda step: 0.1 / (1 + min(step, EAGER_STEPS)))
    assert not torch.allclose(found, other, rtol=1e-4)  # the rate is read at each step


def test_a_batch_of_another_size_goes_its_own_way():
    sizes = (4, 4, 4, 4, 4, 2, 4, 4)
    eager, _ = trained(False, lambda step: 0.1, sizes)
    found, recordings = trained(True, lambda step: 0.1, sizes)
    assert len(recordings) == 1
    torch.testing.assert_close(found, eager, rtol=1e-6, atol=1e-7)


GPU = Precision("bf16", torch.device("cuda"))
FUSED, FOREACH = SimpleNamespace(implementation="fused"), SimpleNamespace(implementation="foreach")
PAIR = SimpleNamespace(size=2, name="horovod (MPI + NCCL)", sums_in_graphs=False)
NCCL = SimpleNamespace(size=2, name="torch.distributed (NCCL)", sums_in_graphs=True)


@pytest.mark.parametrize(
    ("wanted", "precision", "optimizer", "comm", "recorded", "said"),
    [
        ("auto", GPU, FUSED, ALONE, True, "one CUDA graph"),
        ("off", GPU, FUSED, ALONE, False, ""),
        ("auto", Precision("bf16", torch.device("cpu")), FUSED, ALONE, False, ""),
        ("auto", Precision("fp16", torch.device("cuda")), FUSED, ALONE, False, "no CUDA graph: in fp16"),
        ("auto", GPU, FOREACH, ALONE, False, "foreach"),
        ("auto", GPU, FUSED, PAIR, False, "outside of CUDA's streams"),
        ("auto", GPU, FUSED, NCCL, False, "train.graph=on"),
        ("on", GPU, FUSED, NCCL, True, "one CUDA graph"),
    ],
)
def test_where_a_step_is_recorded_and_why_not(wanted, precision, optimizer, comm, recorded, said):
    found, reason = chosen(wanted, precision, optimizer, comm)
    assert found is recorded
    assert said in reason


@pytest.mark.parametrize(
    ("precision", "comm", "reason"),
    [(GPU, PAIR, "horovod"), (Precision("fp32", torch.device("cpu")), ALONE, "it is for GPUs")],
)
def test_one_that_must_be_recorded_and_cannot_is_refused(precision, comm, reason):
    with pytest.raises(UserError, match=f"train.graph=on: .*{reason}"):
        chosen("on", precision, FUSED, comm)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_on_a_gpu_a_recorded_run_is_the_eager_one(precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = []
    for recorded in (False, True):
        setup = Setup("R20x0.5-32px", batch=16, precision=precision, device="cuda", size=32, num_classes=10)
        trainer = build(setup, ALONE)
        trainer.model.train()
        if recorded:
            trainer.watch.lap = lambda name: None  # events of a recording cannot be read
            trainer._work = RecordedStep(trainer._on_device, trainer.optimizer)
        trainer.learning_rate = lambda step: 0.05 / (1 + step)
        for step in range(12):
            trainer.train_step([images(range(16 * step, 16 * step + 16), setup, torch.device("cuda"))])
        assert isinstance(trainer.model, nn.Module)
        results.append(trainer.flat.values.clone())
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
