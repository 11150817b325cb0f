"""Which GPU a rank takes, on machines that have none: what torch says of the GPUs is patched."""

from types import SimpleNamespace

import pytest
import torch

from engine.comm.communicator import Communicator, SharedError
from engine.comm.device import choose_device, refuse_shared_gpus
from engine.comm.launch import Launch
from loaders.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Shows this process so many GPUs; the list of those that were taken."""

    def show(count):
        taken = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        return taken

    return show


def rank(local_rank, size=4):
    return Communicator(Launch("Slurm", local_rank, size, local_rank))


@pytest.mark.parametrize(("visible", "local_rank", "expected"), [(1, 0, 0), (1, 3, 0), (4, 0, 0), (4, 3, 3), (2, 1, 1)])
def test_one_visible_gpu_is_this_ranks_whatever_its_number(gpus, visible, local_rank, expected):
    taken = gpus(visible)
    assert choose_device("auto", rank(local_rank)) == torch.device("cuda", expected)
    assert taken == [torch.device("cuda", expected)]


def test_a_rank_without_a_gpu_is_told_how_many_it_sees(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match=r"local rank 3 has no GPU: 2 are visible.*CUDA_VISIBLE_DEVICES=0,1"):
        choose_device("auto", rank(3))


def test_without_gpus_auto_takes_the_cpu_and_cuda_is_an_error(gpus):
    gpus(0)
    assert choose_device("auto", rank(1)) == torch.device("cpu")
    with pytest.raises(UserError, match="no usable GPU"):
        choose_device("cuda", rank(0))


class Ranks(Communicator):
    """Rank 0 of several, who say of their GPUs what is given."""

    def __init__(self, *others):
        super().__init__(Launch("Slurm", 0, 1 + len(others)))
        self._others = others

    def exchange(self, value):
        return [value, *self._others]


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "jwb0001")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-a"))


def test_two_ranks_on_one_gpu_are_refused_with_both_named(mine):
    others = [("jwb0001", "GPU-b"), ("jwb0002", "GPU-a"), ("jwb0001", "GPU-a")]
    with pytest.raises(SharedError, match=r"ranks 0 and 3 .* GPU of jwb0001 \(GPU-a\)"):
        refuse_shared_gpus(torch.device("cuda", 0), Ranks(*others))


def test_a_rank_on_the_cpu_hides_none_that_come_after_it(mine):
    with pytest.raises(SharedError, match=r"ranks 2 and 4 .* GPU of jwb0001 \(GPU-b\)"):
        others = [None, ("jwb0001", "GPU-b"), None, ("jwb0001", "GPU-b")]
        refuse_shared_gpus(torch.device("cuda", 0), Ranks(*others))


def test_gpus_of_different_hosts_and_ranks_on_the_cpu_are_no_concern(mine):
    refuse_shared_gpus(torch.device("cuda", 0), Ranks(("jwb0001", "GPU-b"), ("jwb0002", "GPU-a"), None))
    refuse_shared_gpus(torch.device("cpu"), Ranks(None, None))
