import pytest
import torch

from engine.exporting.deployed import plain
from engine.network import bit, family
from engine.network.bit import BitSpec


@pytest.fixture(autouse=True)
def small_imagenet_root(monkeypatch):
    """The root of the published members, in small."""
    monkeypatch.setitem(family.MEMBERS, "R14x0.25", BitSpec((1, 2, 1, 1), 0.25, groups=8))


@pytest.mark.parametrize("name", ["R14x0.25", "R8x0.25-8px", "R11x0.25-32px"])
@pytest.mark.parametrize("recompute", ["none", "norm", "unit"])
def test_a_network_of_torchs_own_operations_computes_the_same(name, recompute):
    torch.manual_seed(0)
    network = bit.build(name, 4, zero_head=False, recompute=recompute).eval()
    images = torch.randn(3, 3, 33, 33)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    copied = plain(network)
    kinds = {type(module) for module in copied.modules()}
    assert not kinds & {bit.StdConv2d, bit.GroupNormReLU}
    expected = network.double()(images.double()).detach()
    torch.testing.assert_close(copied(images), expected.float(), rtol=0, atol=1e-5 * float(expected.abs().max()))
    network.float()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_another_librarys_network_stays_as_it_is():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).half()
    copied = plain(network)
    assert [type(module) for module in copied] == [type(module) for module in network]
    assert not copied.training and {parameter.dtype for parameter in copied.parameters()} == {torch.float32}
    assert network.training and {parameter.dtype for parameter in network.parameters()} == {torch.float16}
