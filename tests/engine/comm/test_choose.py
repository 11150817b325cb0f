"""Which communicator a launch gets, and what is said where ranks do not find each other."""

from types import SimpleNamespace

import pytest
import torch

from engine.comm import choose as module
from engine.comm.choose import connect
from engine.comm.horovod import HorovodCommunicator
from engine.comm.launch import Launch
from loaders.errors import UserError


@pytest.mark.parametrize(
    ("gpus", "nccl", "mpi", "expected"),
    [
        (False, False, True, "horovod"),
        (False, False, False, "torch"),  # srun's ranks would not find each other through Gloo
        (True, True, True, "horovod"),
        (True, False, True, "torch"),  # each gradient would go through the host
    ],
)
def test_auto_takes_what_reaches_the_devices(monkeypatch, gpus, nccl, mpi, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(module, "has_horovod", lambda: True)
    monkeypatch.setattr(module, "horovod_has_nccl", lambda: nccl)
    monkeypatch.setattr(module, "horovod_speaks_mpi", lambda: mpi)
    for kind in ("HorovodCommunicator", "TorchCommunicator"):
        name = {"HorovodCommunicator": "horovod", "TorchCommunicator": "torch"}[kind]
        monkeypatch.setattr(module, kind, lambda launch, *_, name=name: SimpleNamespace(size=launch.size, name=name))
    assert connect("auto", Launch("Slurm", 0, 4)).name == expected


def program(folder, monkeypatch, name, text):
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("listed", "hint"),
    [
        ("echo 'MPI plugin types are...'; printf '\\tnone\\n\\tpspmi\\n\\tpspmix\\n'", "--mpi=pspmix or --mpi=pspmi"),
        ("echo 'srun: MPI types are: cray_shasta, pmi2, pmix, none' >&2", "--mpi=pmix or --mpi=pmi2"),
        ("exit 1", "srun --mpi=list"),
    ],
)
def test_ranks_that_train_alone_are_told_the_mpi_that_this_cluster_has(tmp_path, monkeypatch, listed, hint):
    program(tmp_path, monkeypatch, "srun", listed)
    monkeypatch.setattr(module, "has_horovod", lambda: True)
    alone = SimpleNamespace(size=1, name="horovod (MPI)")
    monkeypatch.setattr(module, "HorovodCommunicator", lambda launch: alone)
    with pytest.raises(UserError, match="each task would train alone") as refused:
        connect("horovod", Launch("Slurm", 0, 4))
    assert hint in str(refused.value)


def test_gradients_are_summed_on_the_default_stream_only(monkeypatch):
    """Horovod makes that stream, and no other, wait for its sums."""
    streams = {"default": object(), "current": object()}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["current"])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: streams["default"])
    sent = []
    comm = HorovodCommunicator.__new__(HorovodCommunicator)
    comm._hvd = SimpleNamespace(allreduce_async_=lambda tensor, name, op: sent.append(name), Sum=None)
    gradients = SimpleNamespace(is_cuda=True, device="cuda:0")
    with pytest.raises(AssertionError, match="default stream"):
        comm.start_sum_(gradients, "slice")
    assert not sent
    streams["current"] = streams["default"]
    comm.start_sum_(gradients, "slice")
    assert sent == ["slice"]
