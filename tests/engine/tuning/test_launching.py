import math
import time

import pytest
import torch

from engine.network import bit
from engine.network.bit import Bit
from engine.training.precision import Precision
from engine.tuning.launching import launching_seconds

CPU = Precision("fp32", torch.device("cpu"))


def test_seconds_are_in_proportion_to_the_layers(monkeypatch):
    """Counted: a pass of the smallest network takes 1.7 seconds."""
    clock, forward = [0.0], Bit.forward

    def counted(network, images):
        clock[0] += 1.7
        return forward(network, images)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Bit, "forward", counted)
    model = bit.build("R8x0.25-8px", 5)
    layers = sum(not list(module.children()) for module in model.modules())
    assert launching_seconds(model, CPU) == pytest.approx(1.7)
    three_times = torch.nn.Sequential(*[torch.nn.Linear(1, 1) for _ in range(3 * layers)])
    assert launching_seconds(three_times, CPU) == pytest.approx(5.1)


def test_random_numbers_are_left_as_they_were():
    model = torch.nn.Linear(1, 1)
    before = torch.get_rng_state()
    launching_seconds(model, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_it_is_something_on_a_cpu_and_unknown_on_a_gpu(name):
    assert 0 < launching_seconds(bit.build("R8x0.25-8px", 2), Precision(name, torch.device("cpu"))) < 10
    assert math.isnan(launching_seconds(torch.nn.Linear(1, 1), Precision(name, torch.device("cuda"))))
