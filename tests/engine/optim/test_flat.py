import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine.optim.flat import ALIGNMENT, FlatParameters, GradientSum


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.GroupNorm(1, 5)
        self.head = nn.Linear(5, 7)
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Pair:
    """A communicator as if another rank had the same gradients: a sum doubles them."""

    size = 2

    def __init__(self):
        self.log = []

    def start_sum_(self, tensor, name):
        self.log.append(name)
        tensor.mul_(2)
        return SimpleNamespace(wait=lambda: self.log.append(f"wait {name}"))


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_network_computes_as_before_and_gradients_land_in_the_buffer(channels_last):
    torch.manual_seed(0)
    plain = Net()
    moved = copy.deepcopy(plain)
    flat = FlatParameters(moved, channels_last=channels_last)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(moved(x), plain(x), rtol=1e-6, atol=1e-6)
    moved(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, expected), slot in zip(reversed(list(plain.named_parameters())), flat.slots, strict=True):
        assert slot.name == name
        found = FlatParameters.view(flat.grads, slot, channels_last=channels_last)
        wanted = torch.zeros_like(expected) if expected.grad is None else expected.grad
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    flat.zero_grads()
    assert all(p.grad is not None and not p.grad.any() for p in moved.parameters())


@pytest.mark.parametrize("channels_last", [True, False])
def test_rows_are_contiguous_slots_aligned_and_gaps_zero(channels_last):
    net = Net()
    flat = FlatParameters(net, channels_last=channels_last)
    covered = torch.zeros(len(flat.values), dtype=torch.bool)
    for slot, parameter in zip(flat.slots, flat.parameters, strict=True):
        assert slot.offset % ALIGNMENT == 0
        covered[slot.offset : slot.offset + slot.numel] = True
        if parameter.ndim > 1:
            first = parameter.data_ptr()
            assert parameter[1].data_ptr() - first == 4 * parameter[0].numel()
    assert not flat.values[~covered].any()


def test_changing_the_buffer_changes_the_network():
    net = Net()
    flat = FlatParameters(net, channels_last=True)
    flat.values.fill_(2.0)
    assert all((p == 2.0).all() for p in net.parameters())


@pytest.mark.parametrize("slice_bytes", [1, 300, 10**6])
def test_gradients_are_summed_once_whatever_the_slices(slice_bytes):
    torch.manual_seed(0)
    net = Net()
    flat = FlatParameters(net, channels_last=True)
    comm = Pair()
    gradients = GradientSum(flat, comm, slice_bytes)
    x = torch.randn(2, 3, 6, 6)
    for _ in range(2):  # the hooks serve every step
        flat.zero_grads()
        flat.count += 5
        with gradients.during_backward(communicate=False):
            net(x).square().sum().backward()
        single = flat.grads.clone()
        assert not comm.log
        with gradients.during_backward(communicate=True):
            net(x).square().sum().backward()
        torch.testing.assert_close(flat.grads, 4 * single)
        assert flat.count.item() == 10
        started = [name for name in comm.log if not name.startswith("wait")]
        assert len(started) == len(set(started)) == len(comm.log) // 2
        comm.log.clear()


def test_slices_leave_while_the_backward_pass_still_runs():
    net = Net()
    flat = FlatParameters(net, channels_last=True)
    comm = Pair()
    gradients = GradientSum(flat, comm, slice_bytes=1)
    net.conv.weight.register_hook(lambda _: comm.log.append("first layer"))
    with gradients.during_backward(communicate=True):
        net(torch.randn(2, 3, 6, 6)).sum().backward()
    before = comm.log[: comm.log.index("first layer")]
    head = [slot.name for slot in flat.slots].index("head.weight")
    assert f"gradients.{head}" in before
