import math

import pytest
import torch

from engine.training.schedule import learning_rate, linear_scaling
from loaders.errors import UserError


def by_torch(make, steps, peak):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_steps_are_torchs():
    expected = by_torch(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [30, 60, 80]), 90, 0.48)
    actual = [learning_rate(s, kind="step", peak=0.48, total_steps=90, milestones=(30, 60, 80)) for s in range(90)]
    assert actual == pytest.approx(expected, rel=1e-12)


def test_cosine_is_torchs_after_warm_up():
    expected = by_torch(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 80), 80, 0.5)
    actual = [learning_rate(s, kind="cosine", peak=0.5, total_steps=100, warmup_steps=20) for s in range(20, 100)]
    assert actual == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_cosine_ends_at_zero_and_stays():
    for step in (100, 101, 10_000):
        assert learning_rate(step, kind="cosine", peak=1.0, total_steps=100) == 0
    assert learning_rate(99, kind="cosine", peak=1.0, total_steps=100) > 0
    middle = learning_rate(55, kind="cosine", peak=2.0, total_steps=100, warmup_steps=10)
    assert middle == pytest.approx(1 + math.cos(math.pi / 2))


@pytest.mark.parametrize("kind", ["step", "cosine", "constant"])
def test_warm_up_rises_from_zero_to_the_peak(kind):
    rates = [
        learning_rate(s, kind=kind, peak=0.3, total_steps=100, warmup_steps=15, milestones=(50,)) for s in range(16)
    ]
    assert rates == pytest.approx([0.3 * s / 15 for s in range(16)])
    assert rates[15] == 0.3


def test_constant_and_factor():
    assert learning_rate(7, kind="constant", peak=0.1, total_steps=10) == 0.1
    rate = learning_rate(9, kind="step", peak=0.8, total_steps=10, milestones=(3, 5), factor=0.5)
    assert rate == pytest.approx(0.2)


def test_milestone_at_the_end_of_warm_up():
    arguments = {"kind": "step", "peak": 1.0, "total_steps": 10, "warmup_steps": 4, "milestones": (4,)}
    assert learning_rate(4, **arguments) == pytest.approx(0.1)


def test_linear_scaling():
    assert linear_scaling(0.03, 256, 4096) == pytest.approx(0.48)
    assert linear_scaling(0.01, 256, 64) == pytest.approx(0.0025)
    with pytest.raises(UserError, match="0"):
        linear_scaling(0.01, 256, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "cosin"}, "cosin.*step, cosine, constant"),
        ({"warmup_steps": 101}, "warm-up of 101 and 100"),
        ({"warmup_steps": -1}, "-1"),
        ({"milestones": (60, 30)}, "rising"),
        ({"milestones": (5,), "warmup_steps": 10}, "shorten the warm-up"),
    ],
)
def test_bad_schedules(change, message):
    arguments = {"kind": "step", "peak": 1.0, "total_steps": 100} | change
    with pytest.raises(UserError, match=message):
        learning_rate(0, **arguments)
