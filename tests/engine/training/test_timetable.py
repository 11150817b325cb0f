"""The steps of a run: from epochs, or as they are given."""

import pytest

from engine.config.schema import OptimConfig, ScheduleConfig
from engine.training.timetable import timetable

OPTIM = OptimConfig(base_lr=0.1, base_batch=256)


def test_epochs_become_steps():
    config = ScheduleConfig(kind="step", epochs=3.0, warmup_epochs=0.5, milestones=[1.0, 2.0])
    found = timetable(config, OPTIM, samples=1000, global_batch=100)
    assert (found.total_steps, found.warmup_steps, found.milestones) == (30, 5, (10, 20))
    assert found.steps_per_epoch == 10
    assert found.peak == pytest.approx(0.1 * 100 / 256)


@pytest.mark.parametrize("epochs", [None, 90.0])
def test_steps_take_the_place_of_epochs(epochs):
    config = ScheduleConfig(kind="step", epochs=epochs, steps=100, warmup_steps=7, milestones=[30.0, 60.0])
    found = timetable(config, OPTIM, samples=1000, global_batch=512)
    assert (found.total_steps, found.warmup_steps, found.milestones) == (100, 7, (30, 60))
    assert found.steps_per_epoch == 1000 / 512


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_only_steps_have_milestones(kind):
    config = ScheduleConfig(kind=kind, epochs=100.0, warmup_epochs=0.0)
    assert timetable(config, OPTIM, samples=1000, global_batch=100).milestones == ()


def test_the_shortest_run_has_a_step():
    config = ScheduleConfig(kind="cosine", epochs=0.01, warmup_epochs=0.0)
    assert timetable(config, OPTIM, samples=10, global_batch=100).total_steps == 1
