import json

import pytest
import torch

from bench import lagging
from bench.disturbed import lagging as measured
from bench.disturbed.lagging import Link
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch


def trial(kind, slow, *named):
    return {"kind": kind, "slow": slow, "named": [list(each) for each in named], "watching": 0.001, "step_s": 0.05}


TRIALS = [
    trial("input", 1, (50, 1, "input")),
    trial("input", 1, (70, 1, "input")),
    trial("input", 1, (50, 1, "compute")),
    trial("input", 1, (50, 2, "input"), (60, 1, "input")),
    trial("none", None),
    trial("none", None, (50, 2, "link")),
]


def test_right_is_the_slowed_rank_for_its_reason_and_nobody_else():
    found = lagging.judged(TRIALS)
    assert {kind: (row["right"], row["trials"]) for kind, row in found.items()} == {"input": (2, 4), "none": (1, 2)}
    assert found["input"]["steps_until_named"] == 60
    assert found["none"]["steps_until_named"] is None
    assert found["input"]["low"] < 0.5 < found["input"]["high"]


def test_the_table_and_the_record(monkeypatch, tmp_path, capsys):
    said = {"trials": TRIALS, "watching": [0.001, 0.002, 0.003], "long_step_s": 0.05}

    class Done:
        returncode = 0
        stdout = "noise\n" + measured.MARK + json.dumps(said) + "\n"

    monkeypatch.setattr(lagging.subprocess, "run", lambda *words, **how: Done)
    monkeypatch.setattr(lagging, "rank_command", lambda ranks, launcher: ["python"])
    assert lagging.main(["--trials", "4", "--out", str(tmp_path / "new" / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "2 of 4" in out
    assert "watching takes 0.20% of a step, 0.30% on one rank" in out
    record = json.loads((tmp_path / "new" / "out.json").read_text())
    assert record["supports"] == ["monitoring"]
    assert record["kinds"]["none"]["right"] == 1
    assert record["trials"] == TRIALS


def test_ranks_that_fail_and_numbers_out_of_range_are_told(monkeypatch, capsys):
    class Done:
        returncode, stdout = 3, ""

    monkeypatch.setattr(lagging.subprocess, "run", lambda *words, **how: Done)
    monkeypatch.setattr(lagging, "rank_command", lambda ranks, launcher: ["python"])
    assert lagging.main([]) == 1
    assert "ended with code 3" in capsys.readouterr().err
    assert lagging.main(["--ranks", "1"]) == 2


@pytest.fixture
def slept(monkeypatch):
    """Seconds that were slept, without sleeping."""
    found = []
    monkeypatch.setattr(measured.time, "sleep", found.append)
    return found


def test_a_slow_link_delays_by_what_goes_through_it_and_in_order(slept):
    link = Link(Communicator(Launch("alone")))
    link.seconds_per_byte = 0.5
    handle = link.start_sum_(torch.zeros(4), "a")
    link.broadcast_(torch.zeros(2), "b", 0)
    handle.wait()
    assert link.exchange("x") == ["x"]
    assert slept == [8.0, 4.0, 0]


@pytest.mark.parametrize(("kind", "longer"), [("none", 0.0), ("input", 8.0), ("compute", 8.0), ("link", 8.0)])
def test_a_trial_slows_what_it_says_by_its_share(slept, kind, longer):
    link = Link(Communicator(Launch("alone")))
    link.size = 1
    found = measured.trial(link, kind, 0, 1, step_s=40.0, slower=0.2, steps=6, every=3)
    assert found["named"] == []
    steps = sum(seconds for seconds in slept if seconds > 1e-3)
    alone = kind == "link"  # one rank sends nothing
    assert steps / 6 == pytest.approx(40.0 + (0 if alone else longer), rel=0.05)
