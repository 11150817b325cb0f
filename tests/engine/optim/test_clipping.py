"""Rows that were clipped, as the optimizers count them, against a count in float64."""

import pytest
import torch
from torch import nn

from engine import compiled
from engine.network import bit
from engine.optim import AgcAdamW, AgcSgd, StandardizedWeights, named_groups
from engine.optim.clipping import Clipped, Counts, by_layer, total
from engine.optim.flat import FlatParameters
from engine.optim.ops import hyper_row
from tests.support.agc_cases import SETTINGS, Bag, arrange, clipped_rows, give, gradients

built = pytest.mark.skipif(not compiled.loaded(), reason="engine._C is not built: python setup.py build_ext --inplace")
SHAPES = [(30, 50), (20, 20000), (4, 3, 3, 3), (9,), (), (0, 4), (3, 0)]
PATHS = [*(pytest.param(f"{layout} fused", marks=built) for layout in ("flat", "list")), "list foreach"]


@pytest.mark.parametrize("kind", [AgcSgd, AgcAdamW])
@pytest.mark.parametrize("path", PATHS)
def test_what_is_counted_is_what_is_clipped(path, kind):
    layout, implementation = path.split()
    params = arrange(Bag(SHAPES), layout)
    groups = [{"params": params[:2]}, {"params": params[2:3], "clipping": None}, {"params": params[3:]}]
    optimizer = kind(groups, lr=0.1, clipping=0.01, implementation=implementation)
    assert optimizer.clipped() == {}
    for steps in (3, 1):
        expected = [0] * len(params)
        for step in range(steps):
            grads = gradients(params, step)
            give(params, grads, layout)
            for index, number in enumerate(clipped_rows(params, grads, [hyper_row(SETTINGS)] * len(params))):
                expected[index] += number
            optimizer.step()
        found = optimizer.clipped()
        assert list(found) == ["0.0", "0.1", "2.0", "2.1"]
        assert [tuple(each) for each in found.values()] == [
            (expected[0], steps * 30), (expected[1], steps * 20), (expected[3], steps), (expected[4], steps)
        ]  # fmt: skip
    assert 0 < expected[0] < 30


@built
def test_counts_survive_gradients_that_come_and_go_and_a_new_group():
    params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5, 2))]
    optimizer = AgcSgd(zip(("one", "two"), params, strict=True), implementation="fused")
    params[0].grad = torch.ones(3, 4)
    optimizer.step()
    params[1].grad = torch.zeros(5, 2)
    optimizer.step()
    more = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [("three", more)]})
    more.grad = torch.ones(2)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert optimizer.clipped() == {"one": (9, 9), "two": (0, 10), "three": (1, 1)}


@built
def test_standardized_rows_are_counted_by_what_clipping_sees():
    model = bit.build("R8x0.25-8px", 4, zero_head=False)
    flat = FlatParameters(model, channels_last=True)
    weights = StandardizedWeights(model, flat, torch.float32).forward_weights
    optimizer = AgcSgd(named_groups(model, 1e-4), lr=0.1, clipping=0.1, forward_weights=weights)
    names = {p: name for name, p in model.named_parameters()}
    flat.grads.copy_(torch.randn_like(flat.grads) * 0.1)
    settings = SETTINGS | {"clipping": 0.1}
    expected = {
        names[p]: clipped_rows([p], [p.grad], [hyper_row(settings, weights.eps if p in weights.standardized else None)])
        for p in flat.parameters
    }
    optimizer.step()
    found = optimizer.clipped()
    assert set(found) == {name for name in expected if not name.startswith("head.conv")}
    assert {name: [each.clipped] for name, each in found.items()} == {name: expected[name] for name in found}
    assert 0 < sum(each.clipped for each in found.values()) < sum(each.rows for each in found.values())


def test_sums_grow_with_their_parameters():
    counts, params = Counts(), [torch.ones(2), torch.ones(3)]
    counts.add(params[1:], torch.tensor([1]), torch.tensor([2]))
    counts.add(params, torch.tensor([3, 4]), torch.tensor([5, 6]))
    assert counts.take() == {params[0]: (3, 5), params[1]: (5, 8)}
    assert counts.take() == {}
    assert Clipped(5, 8).share == 0.625
    assert Clipped(0, 0).share == 0.0
    layers = by_layer({"a.conv.weight": Clipped(1, 8), "b": Clipped(2, 3), "a.conv.bias": Clipped(1, 1)})
    assert layers == {"a.conv": (2, 9), "b": (2, 3)}
    assert total(layers.values()) == (4, 12)
