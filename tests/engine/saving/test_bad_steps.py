import math

import pytest
import torch

from engine.saving.bad_steps import BadSteps

CPU = torch.device("cpu")


def looked_at(steps, values):
    for step, value in enumerate(values, 1):
        grads = torch.full((1000,), 1e30)
        grads[7] = value
        steps.look(grads)
        steps.note(step, [torch.tensor([step])])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_none_makes_a_step_bad(value):
    steps = BadSteps(CPU, 0)
    grads = torch.zeros(1000)
    assert steps.look(grads).item() == 0
    grads[500] = value
    found = steps.look(grads)
    assert (found.shape, found.dtype, found.item()) == ((1,), torch.float32, 1)


@pytest.mark.parametrize(("allowed", "beyond"), [(0, (2, 1)), (1, (5, 2)), (2, (6, 3)), (3, None)])
def test_the_first_step_beyond_what_is_allowed_in_a_row(allowed, beyond):
    steps = BadSteps(CPU, allowed)
    looked_at(steps, [1.0, math.nan, 1.0, math.inf, math.nan, -math.inf, 1.0])
    found = steps.beyond(all_steps=False)
    assert (found and (found.step, found.in_a_row)) == beyond
    assert found is None or [ids.tolist() for ids in found.sample_ids] == [[found.step]]
    assert steps.read() == 4
    assert steps.read() == 0


@pytest.mark.gpu
def test_on_a_gpu_the_newest_steps_are_looked_at_when_asked_for():
    steps = BadSteps(torch.device("cuda"), 0)
    for step, value in ((1, 0.0), (2, math.nan), (3, 0.0)):
        steps.look(torch.full((1000,), value, device="cuda"))
        steps.note(step, [])
    assert steps.beyond(all_steps=False) is None
    assert steps.beyond(all_steps=True).step == 2
    assert steps.read() == 1
