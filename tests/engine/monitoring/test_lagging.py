"""On figures with seeded noise: what ranks do with real ones is in bench/lagging.py."""

import time

import numpy as np
import pytest
import torch

from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.monitoring import lagging
from engine.monitoring.lagging import Lagging, Late, Probe

RANKS, STEP = 4, 0.1
HOSTS = ["n"] * RANKS
ROUND = 0.016  # seconds, of messages


def interval(random, noise, rank=None, kind=None, late=0.2):
    """Phases and waiting of an interval, seconds a step: all ranks take as long as the slowest."""
    reading, computing = 0.1 * STEP * np.ones(RANKS), 0.8 * STEP * np.ones(RANKS)
    if kind == "input":
        reading[rank] += late * STEP
    if kind == "compute":
        computing[rank] += late * STEP
    reading, computing = (each + random.normal(0, noise * STEP, RANKS) for each in (reading, computing))
    own = reading + computing
    link = late * STEP if kind == "link" else 0.0
    return {"input": reading, "compute": computing}, own.max() - own + 0.01 * STEP + link


def messages(random, rank=None):
    """A round of messages, noisy upwards only."""
    found = 0.002 + random.exponential(0.001, (RANKS, RANKS))
    if rank is not None:
        found[rank] += 0.1 * STEP
        found[:, rank] += 0.1 * STEP
    return Probe(found, ROUND)


def run(kind, seed, intervals=8, noise=0.02):
    """Whom a run of so many intervals names, in turn."""
    random = np.random.default_rng(seed)
    rank, test, named = int(random.integers(RANKS)), Lagging(HOSTS), []
    for _ in range(intervals):
        phases, wait = interval(random, noise, rank, kind)
        probed = test.wants_probe(phases["input"] + phases["compute"], wait, 10)
        late = test.see(phases, wait, messages(random, rank if kind == "link" else None) if probed else None)
        if late and (not named or named[-1][:2] != (late.rank, late.reason)):
            named.append((late.rank, late.reason, late.share))
    return rank, named


@pytest.mark.parametrize("kind", ["input", "compute", "link"])
@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_the_slow_rank_is_named_with_its_reason(kind, noise):
    for seed in range(20):
        rank, named = run(kind, seed, noise=noise)
        assert [each[:2] for each in named] == [(rank, kind)], seed
        assert 0.1 < named[0][2] < 0.3


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_noise_names_nobody(noise):
    named = [run(None, seed, intervals=20, noise=noise)[1] for seed in range(60)]
    assert sum(map(bool, named)) <= 3


def test_a_hiccup_of_two_intervals_names_nobody_and_one_who_recovers_is_forgotten():
    random, test = np.random.default_rng(0), Lagging(HOSTS)
    seen = []
    for kind in [None] * 6 + ["compute"] * 2 + [None] * 6 + ["compute"] * 8 + [None] * 6:
        late = test.see(*interval(random, 0.01, 2, kind, late=0.5))
        seen.append(None if late is None else (late.rank, late.reason))
    assert seen[:14] == [None] * 14
    assert seen[21] == (2, "compute")
    assert seen[-1] is None


def test_who_is_named_stays_so_until_it_is_half_as_late_as_names():
    random, test = np.random.default_rng(0), Lagging(HOSTS)
    for late, named in ((0.04, False), (0.1, True), (0.04, True), (0.02, False)):
        for _ in range(6):
            found = test.see(*interval(random, 0.001, 1, "input", late))
        assert bool(found) == named, late


def test_a_rank_that_always_differs_by_little_is_not_named():
    random, test = np.random.default_rng(0), Lagging(HOSTS)
    assert not any(test.see(*interval(random, 0.001, 3, "compute", 0.05)) for _ in range(20))


def test_of_two_ranks_each_can_be_late_but_no_link():
    test, own = Lagging(["a", "a"]), np.array([1.0, 1.0])
    assert not test.wants_probe(own, np.array([9.0, 9.0]), 10)
    for _ in range(5):
        late = test.see({"input": own, "compute": np.array([1.0, 2.0])}, np.array([1.0, 0.0]))
    assert late.rank == 1
    alone = Lagging(["a"])
    assert not any(alone.see({"input": own[:1], "compute": own[:1]}, np.zeros(1)) for _ in range(9))


def test_probes_come_in_rounds_that_cost_little_in_the_long_run():
    test, random = Lagging(HOSTS), np.random.default_rng(0)
    phases, wait = interval(random, 0, kind="link")
    own, made = phases["input"] + phases["compute"], []
    for number in range(2000):
        if test.wants_probe(own, wait, 10):
            made.append(number)
            test.see(phases, wait, messages(random))
        else:
            test.see(phases, wait)
    assert made[:2] == [0, 1]
    assert made[2] > 3  # no link seems slow
    assert len(made) * ROUND < 2 * lagging.PROBING * 2000 * 10 * 1.2 * STEP
    assert len(made) > 3
    assert test.named is None


def test_where_nobody_waits_there_is_no_probe():
    phases, wait = interval(np.random.default_rng(0), 0)
    assert not Lagging(HOSTS).wants_probe(phases["input"] + phases["compute"], wait, 10)


def test_of_nodes_only_what_travels_between_them_tells():
    """Messages inside a node are quick, also of the one that is badly connected."""
    hosts = ["a", "a", "b", "b", "c", "c"]
    apart = np.array([[one != other for other in hosts] for one in hosts])
    taken = np.where(apart, 0.010, 0.001)
    taken[4:, :4] += 0.02
    taken[:4, 4:] += 0.02
    test = Lagging(hosts)
    same, wait = np.full(6, 0.05), np.full(6, 0.05)
    for _ in range(5):
        late = test.see({"input": same, "compute": same}, wait, Probe(taken, ROUND))
    assert late.rank in (4, 5)
    assert late.reason == "link"
    assert not Lagging(["a", "a", "b", "b"]).wants_probe(np.full(4, 0.05), np.full(4, 0.05), 10)


def test_a_probe_asks_each_rank_in_turn(monkeypatch):
    asked = []
    comm = Communicator(Launch("alone"))
    comm.size = 3
    monkeypatch.setattr(comm, "broadcast_", lambda tensor, name, root: asked.append((tensor.numel(), root)))
    monkeypatch.setattr(comm, "sum_", lambda tensor, name: time.sleep(0.01))  # waiting for the others costs, too
    monkeypatch.setattr(comm, "gather", lambda array, name: np.repeat(array, 3, axis=0))
    probed = lagging.probe(comm, torch.zeros(7))
    assert asked == [(7, 0), (7, 1), (7, 2)]
    assert probed.messages.shape == (3, 3)
    assert (probed.messages >= 0).all()
    assert probed.seconds >= 0.03


@pytest.mark.parametrize("reason", lagging.REASONS)
def test_people_are_told_rank_place_reason_and_cost(reason):
    said = lagging.in_words(Late(3, reason, 0.171), "node7")
    assert "rank 3 on node7 lags" in said
    assert lagging.REASONS[reason] in said
    assert "17%" in said
