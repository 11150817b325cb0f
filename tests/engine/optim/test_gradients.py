"""Gradients from autograd into the buffer, and over ranks that only seem to be there."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.optim.flat import ALIGNMENT, FlatParameters
from engine.optim.gradients import TRAVEL, GradientSum
from loaders.errors import UserError
from tests.support.small_net import Net

ALONE = Communicator(Launch("alone"))


class Pair:
    """A communicator as if another rank had the same gradients: a sum doubles them."""

    size = 2

    def __init__(self):
        self.log = []

    def start_sum_(self, tensor, name):
        self.log.append(name)
        tensor.mul_(2)
        return SimpleNamespace(wait=lambda: self.log.append(f"wait {name}"))


@pytest.mark.parametrize("slice_bytes", [1, 300, 10**6])
def test_gradients_are_summed_once_whatever_the_slices(slice_bytes):
    torch.manual_seed(0)
    net = Net()
    flat = FlatParameters(net, channels_last=True)
    comm = Pair()
    gradients = GradientSum(flat, comm, slice_bytes)
    x = torch.randn(2, 3, 6, 6)
    flat.grads.fill_(float("nan"))  # what was there before is not added to
    for slot in flat.slots:
        flat.grads[slot.offset + slot.numel : slot.offset + -(-slot.numel // ALIGNMENT) * ALIGNMENT] = 0
    for _ in range(2):  # the hooks serve every step
        flat.count.fill_(5)
        with gradients.during_backward(last=False):
            net(x).square().sum().backward()
        single = flat.grads.clone()
        assert not comm.log
        with gradients.during_backward(first=False):
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
    with gradients.during_backward():
        net(torch.randn(2, 3, 6, 6)).sum().backward()
    before = comm.log[: comm.log.index("first layer")]
    head = [slot.name for slot in flat.slots].index("head.weight")
    assert f"gradients.{head}" in before


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_alone_the_gradients_are_those_of_plain_autograd(micro_batches):
    torch.manual_seed(0)
    plain = Net()
    moved = copy.deepcopy(plain)
    flat = FlatParameters(moved, channels_last=True)
    gradients = GradientSum(flat, ALONE, slice_bytes=300)
    flat.grads.fill_(float("nan"))
    parts = [torch.randn(2, 3, 6, 6) for _ in range(micro_batches)]
    for index, x in enumerate(parts):
        plain(x).square().sum().backward()
        with gradients.during_backward(first=index == 0, last=index == micro_batches - 1):
            moved(x).square().sum().backward()
    for name, p in plain.named_parameters():
        found = moved.get_parameter(name).grad
        torch.testing.assert_close(found, torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-5, atol=1e-6)


class Leaf(nn.Module):
    """One parameter, which is read as bfloat16, and a pass whose gradient is what it is given."""

    def __init__(self, numel):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numel))


def test_half_gradients_are_summed_in_float32():
    """257 times 1 + 2^-7: a sum in bfloat16 would stand still at 256."""
    model = Leaf(4)
    flat = FlatParameters(model, channels_last=True)
    leaf = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    flat.leaves[0] = leaf
    gradients = GradientSum(flat, ALONE, slice_bytes=1)
    seen = []
    leaf.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    for index in range(257):
        with gradients.during_backward(first=index == 0, last=index == 256):
            leaf.backward(torch.full((4,), 1.0078125, dtype=torch.bfloat16))
    assert model.weight.grad.tolist() == [257 * 1.0078125] * 4
    assert seen == [None] * 257  # none is kept beside the buffer


@pytest.mark.parametrize("ranks", [2, 7, 64])
def test_the_error_of_gradients_that_travel_as_bfloat16_is_bounded(ranks):
    """Any order of summation, here one after the other, rounds each rank's gradients and each partial sum."""
    random = torch.Generator().manual_seed(ranks)
    others = [torch.randn(999, generator=random) * 10 ** torch.randn(999, generator=random) for _ in range(ranks)]

    class Ranks:
        size, sums_bfloat16 = ranks, True

        def start_sum_(self, tensor, name):
            if name == "sums":
                tensor.mul_(ranks)
            else:
                sent.append(tensor.dtype)
                for other in others[1:]:
                    tensor += _padded(other, tensor)
            return SimpleNamespace(wait=lambda: None)

    sent = []
    model = Leaf(999)
    flat = FlatParameters(model, channels_last=True)
    gradients = GradientSum(flat, Ranks(), slice_bytes=2**20, travel=torch.bfloat16)
    flat.count.fill_(70001)  # not a number that bfloat16 has
    with gradients.during_backward():
        model.weight.backward(others[0])
    exact, magnitude = (torch.stack(parts).double().sum(0) for parts in (others, [o.abs() for o in others]))
    error = (model.weight.grad.double() - exact).abs()
    assert (error <= ranks * 2.0**-8 * magnitude).all()
    assert error.max() > 0
    assert sent == [torch.bfloat16]
    assert flat.count.item() == 70001 * ranks


def test_a_library_that_sums_no_bfloat16_is_refused():
    class Horovod(Pair):
        name, sums_bfloat16 = "horovod (MPI)", False

    flat = FlatParameters(Leaf(3), channels_last=True)
    with pytest.raises(UserError, match=r"comm.gradients=bf16: horovod \(MPI\) sums no bfloat16; choose"):
        GradientSum(flat, Horovod(), 2**20, TRAVEL["bf16"])


def _padded(values, like):
    return torch.cat([values, values.new_zeros(len(like) - len(values))]).to(like.dtype)
