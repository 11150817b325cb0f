import copy

import pytest
import torch

from engine.optim.flat import ALIGNMENT, FlatParameters
from tests.support.small_net import Net


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
    flat.detach()
    assert all(leaf.grad is None for leaf in flat.leaves)
    flat.attach()
    assert all(p.grad is place for p, place in zip(flat.parameters, flat.places, strict=True))


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
