"""Tables made up so that one cause is known; that real runs give such tables is in tests/engine/test_doctor.py."""

import math

import numpy as np
import pytest

from engine.monitoring.diagnosis import COLUMNS, Facts, diagnose, report, said, text


def table(ranks=4, **more):
    """Seconds a step: 90 ms of computing and 5 of the optimizer; a column is one number, or one for each rank."""
    usual = {"input": 0.001, "compute": 0.090, "wait": 0.001, "optimizer": 0.005, "other": 0.0005, "decoding": 0.001,
             "launching": 0.002}  # fmt: skip
    values = dict.fromkeys(COLUMNS, math.nan) | usual | more
    return {name: np.broadcast_to(np.array(value, dtype=float), (ranks,)).copy() for name, value in values.items()}


def facts(ranks=4, hosts=None, **more):
    return Facts(hosts or ["n1"] * ranks, **more)


GPU = {"launching": math.nan, "ahead": 1.0, "clock": 1900.0, "most_clock": 1980.0, "power": 600.0, "temperature": 60.0,
       "throttled": 0.0}  # fmt: skip
NODES = ["n1", "n1", "n2", "n2", "n3", "n3", "n4", "n4"]
SLOW = np.array([0.090] * 6 + [0.130] * 2), np.array([0.041] * 6 + [0.001] * 2)
CASES = {
    # what is found, what must be said: figures, facts
    "healthy": ("healthy", [], table(), facts()),
    "one rank, healthy": ("healthy", [], table(1), facts(1)),
    "healthy, but": ("healthy", ["lost, most of it in starting operations"], table(1, launching=0.01, wait=0),
                     facts(1)),
    "decoding threads are too few": (
        "input-bound", ["data.threads=3", "1.0 of 1 decoding"],
        table(input=0.150, decoding=0.148), facts(threads=1, cores=8)),
    "decoding threads are as many as cores": (
        "input-bound", ["--resize", "2 cores"], table(input=0.150, decoding=0.29), facts(threads=2, cores=2)),
    "a slow disk": (
        "input-bound", ["wait for bytes", "--stage", "0.0 of 4"],
        table(input=0.150, decoding=0.002), facts(threads=4, cores=8)),
    "tiny batches on a CPU": (
        "launch-bound", ["train.micro_batch=auto"], table(1, compute=0.02, launching=0.018, wait=0), facts(1)),
    "tiny batches, fine-tuning": (
        "launch-bound", ["(micro_batch=auto)"], table(1, compute=0.02, launching=0.05), facts(1, keys="")),
    "tiny batches on a GPU": ("launch-bound", ["train.graph=on", "5%"], table(**GPU | {"ahead": 0.05}),
                              facts(device="cuda")),
    "memory": ("memory-bound", ["precision=bf16"], table(**GPU), facts(device="cuda", moving=0.08)),
    "communication": ("communication-bound", ["comm.gradients=bf16"], table(wait=0.080), facts()),
    "a slow link": ("slow rank", ["link of rank 2 on n1"], table(wait=0.080), facts(link=2)),
    "a slow rank, computing": (
        "slow rank", ["rank 3 on n1", "forward and backward take 130 ms", "the others' 90"],
        table(compute=[0.09, 0.09, 0.09, 0.13], wait=[0.041, 0.041, 0.041, 0.001]), facts()),
    "the slower of two": (
        "slow rank", ["rank 0", "its input take 81 ms", "the others' 1 ms"],
        table(2, input=[0.081, 0.001], wait=[0.001, 0.081]), facts(2)),
    "a slow node": ("slow node", ["2 ranks on n4", "--exclude=n4"], table(8, compute=SLOW[0], wait=SLOW[1]),
                    facts(hosts=NODES)),
    "one of a node": (
        "slow rank", ["rank 7 on n4", "--exclude=n4"],
        table(8, compute=[0.09] * 7 + [0.13], wait=[0.041] * 7 + [0.001]), facts(hosts=NODES)),
    "a throttled GPU": (
        "throttled GPU", ["rank 1", "1000 MHz, the others 1900", "92 °C"],
        table(**GPU | {"compute": [0.09, 0.15, 0.09, 0.09], "wait": [0.061, 0.001, 0.061, 0.061],
                       "clock": [1900, 1000, 1900, 1900], "temperature": [60, 92, 60, 60]}), facts(device="cuda")),
    "all GPUs throttled": (
        "throttled GPU", ["1000 of 1980 MHz"], table(**GPU | {"clock": 1000.0, "throttled": 1.0}),
        facts(device="cuda", moving=0.08)),
    "two causes": (None, ["rank host"], table(input=0.060, wait=0.060), facts()),
    "what is between steps": (None, [], table(other=0.100), facts()),
    "waiting for the one that logs": (None, [], table(wait=[0.0, 0.1, 0.1, 0.1], other=[0.1, 0.0, 0.0, 0.0]), facts()),
    "nothing at all": (None, [], table(input=0, compute=0, wait=0, optimizer=0, other=0, launching=0), facts()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_finding(case):
    kind, words, figures, known = CASES[case]
    finding = diagnose(figures, known)
    assert (finding and finding.kind) == kind
    told = report(figures, known)
    for word in words:
        assert " ".join(word.split()) in " ".join(told.split()), told
    if finding and kind != "healthy":
        assert finding.change


@pytest.mark.parametrize(("other", "named"), [(0.024, True), (0.026, False)])
def test_a_cause_is_named_where_it_explains_four_fifths_of_what_is_lost(other, named):
    figures = table(input=0.100, wait=0, launching=0, other=other)
    finding = diagnose(figures, facts(threads=1, cores=4))
    assert bool(finding) == named


def test_a_slowed_rank_loses_time_only_for_those_that_wait():
    """The share that is quoted is of the usual rank's step."""
    figures = table(compute=[0.09, 0.09, 0.09, 0.14], wait=[0.05, 0.05, 0.05, 0.0], other=0, input=0, launching=0)
    finding = diagnose(figures, facts())
    assert finding.because.startswith("all wait for rank 3 on n1: 50 ms of a step of 145 ms, 100% of what is lost")


def test_the_table_shows_what_is_known_and_of_many_ranks_the_slowest():
    few = text(table(2), facts(2)).splitlines()
    assert few[0].split() == ["rank", "host", "input", "compute", "wait", "optimizer", "other", "decoding", "launching",
                              "ms", "a", "step"]  # fmt: skip
    assert few[1].split() == ["0", "n1", "1.00", "90.00", "1.00", "5.00", "0.50", "1.00", "2.00"]
    compute = np.full(100, 0.09)
    compute[50] = 0.2
    many = text(table(100, compute=compute), facts(100)).splitlines()
    assert len(many) < 20
    assert any(line.split()[0] == "50" for line in many[1:])
    assert "MHz" in text(table(**GPU), facts()).splitlines()[0]


def test_a_finding_in_a_line():
    finding = diagnose(table(input=0.15, decoding=0.15), facts(threads=1, cores=8))
    assert said(finding) == f"input-bound: {finding.because}; change data.threads=3"
