import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engine import finetune, pretrain
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.loading import load, to_yaml
from engine.config.schema import FinetuneConfig, PretrainConfig
from engine.optim.flat import FlatParameters
from engine.training import objective
from engine.training.precision import Precision
from engine.tuning import micro_batch
from loaders.errors import UserError

ALONE = Communicator(Launch("alone"))


@pytest.mark.parametrize(
    ("batch", "ranks", "found"),
    [(64, 1, [1, 2, 4, 8, 16, 32, 64]), (64, 3, [1, 2, 4, 8, 16]), (7, 1, [1, 7]), (7, 7, [1]),
     (60, 1, [1, 2, 4, 6, 12, 20, 30, 60]), (4096, 1024, [1, 2, 4])],
)  # fmt: skip
def test_sizes_share_the_batch_out_to_all_ranks(batch, ranks, found):
    assert micro_batch.sizes(batch, ranks) == found


@pytest.mark.parametrize("batch", [5040, 2**20, 99991])
def test_of_many_sizes_some_are_tried(batch):
    found = micro_batch.sizes(batch, 1)
    assert len(found) <= 30
    assert found[-1] == batch
    assert all(batch % size == 0 for size in found)
    assert all(4 / 3 * a < b for a, b in zip(found, found[1:], strict=False))


def test_more_ranks_than_images_are_refused():
    with pytest.raises(UserError, match="no image for some of 9 ranks"):
        micro_batch.sizes(8, 9)


class Machine:
    """Counts what passes cost: `seconds` of a size, and noise; `room` for some images."""

    def __init__(self, seconds, room=math.inf, noise=0.0):
        self.now, self._seconds, self._room, self.asked = 0.0, seconds, room, []
        self._random, self._noise = np.random.default_rng(0), noise

    def seconds(self, size, passes):
        self.asked.append(size)
        if size > self._room:
            self.now += 0.1
            return math.inf
        each = self._seconds(size) * (1 + self._random.exponential(self._noise))
        self.now += each * passes
        return each

    def search(self, candidates, budget=40.0):
        return micro_batch.search(candidates, self.seconds, budget, lambda: self.now)


SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
CURVES = {
    "larger is better": lambda size: 0.01 + 0.001 * size,
    "flat": lambda size: 0.004 * size,
    "caches overflow": lambda size: 0.002 + 0.001 * size + 0.002 * max(0, size - 16),
    "a bad size": lambda size: (0.001 + 0.001 * size) * (3 if size == 32 else 1),
    "slow": lambda size: 0.5 + 0.1 * size,
}


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("curve", CURVES)
def test_the_choice_is_within_five_percent_of_the_best_and_in_time(curve, noise):
    machine = Machine(CURVES[curve], noise=noise)
    taken = machine.search(SIZES)
    chosen = min(taken, key=lambda size: taken[size] / size)
    best = min(CURVES[curve](size) / size for size in SIZES)
    assert CURVES[curve](chosen) / chosen <= 1.05 * best
    assert machine.now < 60


def test_a_network_for_which_there_is_no_time_is_tried_with_few_images():
    machine = Machine(lambda size: 15.0 * size)
    taken = machine.search(SIZES)
    assert set(taken) == {1}
    assert machine.now < 70


def test_sizes_without_room_are_passed_over():
    machine = Machine(CURVES["larger is better"], room=20)
    taken = machine.search(SIZES)
    assert max(taken) == 16
    assert machine.asked.count(32) == 1
    assert 64 not in machine.asked
    assert Machine(CURVES["flat"], room=0).search(SIZES) == {}


def test_a_size_that_loses_its_room_later_is_not_chosen():
    machine = Machine(CURVES["larger is better"])
    once = machine.seconds

    def seconds(size, passes):
        return math.inf if size == 128 and machine.asked.count(128) > 2 else once(size, passes)

    assert max(micro_batch.search(SIZES, seconds, 40.0, lambda: machine.now)) == 64


class Net(nn.Module):
    """Has room for so many images, counts them, and has a running statistic."""

    def __init__(self, room, error):
        super().__init__()
        self.head, self._room, self._error, self.seen = nn.Linear(3, 5), room, error, set()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images):
        if len(images) > self._room:
            raise self._error
        self.seen.add(len(images))
        self.mean += 1.0
        return self.head(images.mean((2, 3)))


def parts(room=1000, error=None, batch=64):
    model = Net(room, error)
    plan = SimpleNamespace(global_batch=batch, pool=np.arange(10))
    feed = SimpleNamespace(
        plan=plan, train=SimpleNamespace(labels=np.arange(10) % 5), train_transform=SimpleNamespace(size=8),
        config=SimpleNamespace(prefetch=2))  # fmt: skip
    return SimpleNamespace(
        network="timm/net", recompute="none", model=model, flat=FlatParameters(model, channels_last=True), feed=feed,
        objective=objective.choose(np.zeros(1, np.int64)), precision=Precision("fp32", torch.device("cpu")),
    )  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
     RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")],
)  # fmt: skip
def test_want_of_memory_is_no_end(error):
    given = parts(room=9, error=error)
    size, said = micro_batch.fastest(given, ALONE, budget_s=5)
    assert size <= 8
    assert given.model.seen == {1, 2, 4, 8}
    assert said.startswith(f"micro-batch {size}, the fastest of those tried (images/s by size: 1: ")


def test_want_of_memory_for_one_image_is_told():
    with pytest.raises(UserError, match="a micro-batch of 1 finds no memory"):
        micro_batch.fastest(parts_without_count(), ALONE, budget_s=5)


def parts_without_count():
    given = parts(room=2, error=MemoryError())
    forward = given.model.forward

    def fails(images):
        if given.model.seen == {1, 2}:  # the count by two passes is made
            raise MemoryError
        return forward(images)

    given.model.forward = fails
    return given


def test_another_error_passes():
    with pytest.raises(RuntimeError, match="shapes differ"):
        micro_batch.fastest(parts(room=3, error=RuntimeError("shapes differ")), ALONE, budget_s=5)


def test_what_is_not_counted_to_have_room_is_not_tried(monkeypatch):
    given = parts()
    each = 4 * 3 * 8**2 * 4  # images on their way; the network keeps next to nothing
    monkeypatch.setattr(micro_batch, "available_bytes", lambda device, comm: int(24 * each / 0.7))
    _, said = micro_batch.fastest(given, ALONE, budget_s=5)
    assert max(given.model.seen) == 16
    assert "70% of what is free has room for 16" in said


def test_the_run_is_left_as_it_was():
    given = parts()
    before = given.flat.values.clone()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    micro_batch.fastest(given, ALONE, budget_s=5)
    assert torch.equal(given.flat.values, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert given.model.mean == 0
    assert all(parameter.grad is not None for parameter in given.model.parameters())


def test_more_micro_batches_on_one_rank_than_on_another_cost_a_step_more(monkeypatch):
    """4 of 16 on 3 ranks are two for one of them: 8 of 8, three, are quicker where images take equally long."""
    comm = Communicator(Launch("alone"))
    comm.size = 3
    monkeypatch.setattr(micro_batch, "search", lambda sizes, *rest: {size: float(size) for size in sizes})
    size, _ = micro_batch.fastest(parts(), comm)
    assert math.ceil(64 / size / 3) * size == min(math.ceil(64 / each / 3) * each for each in (1, 2, 4, 8, 16))


def test_pre_training_settles_it_says_it_and_freezes_it(digits, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        micro_batch, "fastest", lambda parts, comm: asked.append(parts) or (16, "micro-batch 16, tried")
    )
    words = [f"data.train={digits / 'low-train.h5'}", f"folder={tmp_path / 'run'}", "schedule.epochs=null",
             "schedule.steps=4", "schedule.warmup_steps=1", "train.micro_batch=auto", "train.accumulate=7"]  # fmt: skip
    for said in ("micro-batch 16, tried", "micro-batch 16, as when this run was started"):
        pretrain.pretrain(load(PretrainConfig, "demo", words, "pretrain"), ALONE)
        assert said in capsys.readouterr().out
    assert len(asked) == 1
    frozen = load(PretrainConfig, str(tmp_path / "run" / "config.yaml"), [], "pretrain").train
    assert (frozen.micro_batch, frozen.accumulate, frozen.global_batch) == ("16", 1, 64)


def test_an_earlier_choice_that_does_not_fit_is_made_anew(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(micro_batch, "fastest", lambda parts, comm: (4, ""))
    (tmp_path / "config.yaml").write_text("train: {micro_batch: '5'}")
    given = SimpleNamespace(feed=SimpleNamespace(plan=SimpleNamespace(global_batch=64)))
    for text in ("train: {micro_batch: '5'}", "train: {micro_batch: auto}", "train: 7", "", "]", "train: {}"):
        (tmp_path / "config.yaml").write_text(text)
        assert micro_batch.settled(given, tmp_path, ("train", "micro_batch"), ALONE) == 4
    (tmp_path / "config.yaml").write_text("train: {micro_batch: '32'}")
    assert micro_batch.settled(given, tmp_path, ("train", "micro_batch"), ALONE) == 32
    assert micro_batch.settled(given, None, ("micro_batch",), ALONE) == 4


def test_fine_tuning_settles_it_too(digits, monkeypatch):
    monkeypatch.setattr(micro_batch, "fastest", lambda parts, comm: (parts.feed.plan.global_batch // 4, ""))
    words = [f"data.train={digits / 'low-train.h5'}", f"data.test={digits / 'low-test.h5'}", "from=random",
             "model=R8x0.25-8px", "batch=64", "accumulate=8", "micro_batch=auto"]  # fmt: skip
    config = finetune.with_micro_batch(load(FinetuneConfig, "demo", words, "finetune"), ALONE)
    assert (config.micro_batch, config.accumulate) == ("16", 1)
    assert "micro_batch: '16'" in to_yaml(config)
