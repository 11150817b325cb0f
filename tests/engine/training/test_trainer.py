import copy

import numpy as np
import pytest
import torch
from torch import nn

from engine import compiled
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.optim.agc_sgd import AgcSgd
from engine.optim.flat import FlatParameters
from engine.saving import watchdog
from engine.training import objective
from engine.training.precision import Precision
from engine.training.trainer import Trainer
from loaders.pipelines.batches import Batch

COMM = Communicator(Launch("alone"))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))


def data(steps, batch, labels_per_image=None):
    """Steps of a global batch: images (batch, 3, 6, 6), and labels with unknowns where they are vectors."""
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images = torch.randn(batch, 3, 6, 6, generator=random)
        if labels_per_image is None:
            yield images, torch.randint(0, 4, (batch,), generator=random)
        else:
            labels = torch.randint(0, 2, (batch, labels_per_image), generator=random).float()
            labels[torch.rand(labels.shape, generator=random) < 0.4] = float("nan")
            yield images, labels


def micro_batches(steps, pieces):
    for images, labels in steps:
        ids = torch.arange(len(images))
        parts = zip(images.chunk(pieces), labels.chunk(pieces), ids.chunk(pieces), strict=True)
        yield [Batch(i, y, n, torch.ones(len(n), dtype=torch.bool)) for i, y, n in parts]


def trainer(model, batches, labels, steps, batch, precision="fp32", clipping=None, implementation="foreach"):
    flat = FlatParameters(model, channels_last=True)
    return Trainer(
        model=model,
        flat=flat,
        optimizer=AgcSgd(
            model.parameters(), lr=0.0, weight_decay=1e-3, clipping=clipping, implementation=implementation
        ),
        batches=batches,
        objective=objective.choose(labels),
        learning_rate=lambda step: 0.1 / (1 + step),
        comm=COMM,
        precision=Precision(precision, torch.device("cpu")),
        total_steps=steps,
        global_batch=batch,
    )


def mean_loss(logits, labels):
    if labels.ndim == 1:
        return nn.functional.cross_entropy(logits, labels)
    known = ~labels.isnan()
    return nn.functional.binary_cross_entropy_with_logits(logits[known], labels[known])


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("labels_per_image", [None, 4])
def test_twenty_steps_equal_a_plain_loop(pieces, labels_per_image):
    """The plain loop: whole batch at once, torch's loss, torch's SGD, in double precision."""
    steps, batch = 20, 16
    expected = network().double()
    plain = torch.optim.SGD(expected.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-3, nesterov=True)
    losses = []
    for step, (images, labels) in enumerate(data(steps, batch, labels_per_image)):
        plain.param_groups[0]["lr"] = 0.1 / (1 + step)
        plain.zero_grad()
        loss = mean_loss(expected(images.double()), labels.double() if labels_per_image else labels)
        loss.backward()
        plain.step()
        losses.append(loss.item())

    kind = np.zeros((1, 4)) if labels_per_image else np.zeros(1)
    mine = trainer(network(), micro_batches(data(steps, batch, labels_per_image), pieces), kind, steps, batch)
    found = []
    for _ in range(steps):
        mine.train_step(next(mine.batches))
        found.append(mine.meter.read(batch)["loss"])
    assert found == pytest.approx(losses, rel=1e-5)
    for value, reference in zip(mine.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, reference.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_whose_gradients_are_not_finite_changes_nothing(implementation, value):
    """Only the schedule goes on: as if the others had been all there were, at their own rates."""
    if implementation == "fused" and not compiled.loaded():
        pytest.skip("the extension is not built")
    batches = list(micro_batches(data(5, 8), 2))
    found = []
    for bad in (True, False):
        mine = trainer(network(), iter(()), np.zeros(1), 5, 8, clipping=0.01, implementation=implementation)
        for step, parts in enumerate(batches):
            if step == 2 and not bad:
                mine.step += 1
                continue
            if step == 2:
                parts = [parts[0], parts[1]._replace(images=torch.full_like(parts[1].images, value))]
            mine.train_step(parts)
        found.append([mine.flat.values, *(state["momentum_buffer"] for state in mine.optimizer.state.values())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_fp16_skips_a_step_that_overflows_and_halves_its_scale():
    batches = list(micro_batches(data(3, 8), 1))
    images = batches[1][0].images
    batches[1] = [batches[1][0]._replace(images=torch.full_like(images, 6e4))]  # beyond half precision when summed
    mine = trainer(network(), iter(batches), np.zeros(1), 3, 8, precision="fp16")
    mine.train_step(next(mine.batches))
    before, scale = mine.flat.values.clone(), mine.scaler.get_scale()
    mine.train_step(next(mine.batches))
    assert torch.equal(mine.flat.values, before)
    assert mine.scaler.get_scale() == scale / 2
    mine.train_step(next(mine.batches))
    assert not torch.equal(mine.flat.values, before)
    assert mine.flat.values.isfinite().all()


def test_a_run_that_goes_on_is_the_run_that_never_stopped():
    steps = 12
    whole = trainer(network(), micro_batches(data(steps, 8), 2), np.zeros(1), steps, 8, clipping=0.01)
    for _ in range(steps):
        whole.train_step(next(whole.batches))

    batches = micro_batches(data(steps, 8), 2)
    first = trainer(network(), batches, np.zeros(1), steps, 8, clipping=0.01)
    for _ in range(5):
        first.train_step(next(batches))
    weights, state = copy.deepcopy(first.model.state_dict()), copy.deepcopy(first.state())
    second = trainer(network(), batches, np.zeros(1), steps, 8, clipping=0.01)
    with torch.no_grad():
        second.model.load_state_dict(weights)
    second.load_state(state)
    assert second.step == 5
    for _ in range(5, steps):
        second.train_step(next(batches))
    assert torch.equal(whole.flat.values, second.flat.values)


def test_a_rank_with_more_micro_batches_is_not_ahead_of_the_others(monkeypatch):
    """The watchdog calls the one behind that has passed least."""
    counted = []
    monkeypatch.setattr(watchdog, "passed", lambda doing, *, slow, counts: counted.append(counts))
    sums = []
    for pieces in (1, 3):
        counted.clear()
        one = trainer(network(), micro_batches(data(2, 6), pieces), np.zeros(1, np.int64), 2, 6)
        one.fit()
        sums.append(sum(counted))
    assert sums[0] == sums[1] > 0
