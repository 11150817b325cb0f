"""Less memory for the same numbers: what is made anew is the same to the bit, and what is kept follows from shapes."""

import pytest
import torch

from engine import compiled
from engine.network import bit, products
from engine.network.memory import saved_bytes
from engine.network.recompute import RECOMPUTE, computed_again, made_anew

NETWORK, SIDE = "R20x0.25-32px", 32
needs_operator = pytest.mark.skipif(not compiled.loaded(), reason="engine._C is not built: make env builds it")


def network(recompute):
    torch.manual_seed(0)
    return bit.build(NETWORK, 5, zero_head=False, recompute=recompute).to(memory_format=torch.channels_last)


def images():
    return torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def losses_and_gradients(recompute, dtype):
    model, found = network(recompute), []
    for _ in range(3):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(images()).float().logsumexp(1).sum()
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
def test_losses_and_gradients_are_the_same_to_the_bit(recompute, dtype):
    for found, wanted in zip(losses_and_gradients(recompute, dtype), losses_and_gradients("none", dtype), strict=True):
        assert torch.equal(found, wanted)


def kept(recompute):
    model = network(recompute)
    for module in model.modules():
        if isinstance(module, bit.StdConv2d):
            module.standardized = bit.standardize(module.weight.detach()).requires_grad_()
    tensors = [*model.parameters(), *(m.standardized for m in model.modules() if isinstance(m, bit.StdConv2d))]
    own = frozenset(tensor.untyped_storage()._cdata for tensor in tensors)
    again = [module for module in model.modules() if isinstance(module, bit.Unit)] if recompute == "unit" else []
    x = images()
    return saved_bytes(lambda: model(x), beside=own, again=again), model, x


def inputs(model, x, kinds):
    """Bytes of the float32 inputs of modules of these kinds, and the statistics of the norms."""
    found = []

    def note(module, given):
        statistics = 2 * 4 * len(x) * module.num_groups if isinstance(module, bit.GroupNormReLU) else 0
        found.append(given[0].numel() * 4 + statistics)

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return sum(found)


@needs_operator
def test_kept_is_what_the_shapes_say(monkeypatch):
    plain, model, x = kept("none")
    less, *_ = kept("norm")
    least, *_ = kept("unit")
    monkeypatch.setattr(products, "taken", lambda *_: False)  # two in one call no module's hook
    shared = [unit for unit in model.modules() if isinstance(unit, bit.Unit) and unit.downsample is not None]
    norms = inputs(model, x, (bit.GroupNormReLU,))
    convolutions = inputs(model, x, (bit.StdConv2d,))
    twice = sum(inputs(unit, given, (bit.StdConv2d,)) for unit, given in _first_of(shared, model, x))
    head = 4 * 4 * model.head.conv.in_channels
    assert plain == norms + convolutions - twice + head
    assert less == norms + x.numel() * 4 + head
    units = inputs(model, x, (bit.Unit,))
    last = inputs(model.head, _given(model.head, model, x), (bit.GroupNormReLU,))
    assert least == units + last + x.numel() * 4 + head


def _given(wanted, model, x):
    found = []
    hook = wanted.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return found[0]


def _first_of(units, model, x):
    """The projections, whose input is that of the first convolution too, with that input."""
    return [(unit.downsample, _given(unit.downsample, model, x)) for unit in units]


def test_only_the_tensor_itself_is_made_anew():
    made = []
    x = torch.randn(3, requires_grad=True)
    y = x * 2
    again = torch.full((3,), 5.0)
    with made_anew(y, lambda: made.append(1) or again):
        z = (y * y).sum() + (x * x).sum()
    z.backward()
    assert len(made) == 2  # both factors of y * y
    assert torch.equal(x.grad, 2 * x.detach() + 2 * 2 * again)


def test_parameters_have_gradients_though_the_input_needs_none():
    weight, x = torch.tensor(3.0, requires_grad=True), torch.ones(2)
    computed_again(lambda x: (x * weight).relu(), x).sum().backward()
    assert weight.grad == 2
