import json
import os

import pytest

from bench.measured import timing


def test_variants_take_turns_and_the_order_rotates():
    log = []
    variants = {name: (lambda name=name: log.append(name)) for name in "abc"}
    times = timing.measure(variants, repeats=4, warmup=1, between=lambda: log.append("-"))
    assert "".join(log) == "-a-b-c-b-c-a-c-a-b-a-b-c-b-c-a"
    assert {t.n for t in times.values()} == {4}


def test_summary_of_known_times():
    times = timing.summarize([float(value) for value in range(10, -1, -1)])
    assert times == timing.Times(median=5.0, low=1.0, high=9.0, best=0.0, n=11)


def test_a_record_carries_what_a_claim_needs():
    times = {"x": timing.summarize([1.0, 2.0, 3.0])}
    report = json.loads(json.dumps(timing.record("python -m bench.x", times, supports="optimizer", model="R50x1")))
    assert report["milliseconds"]["x"]["median"] == 2.0
    assert report["hardware"]["cores"] >= 1
    assert {"torch", "python"} <= set(report["versions"])
    assert report["model"] == "R50x1"
    assert len(report["commit"]) >= 7


def test_ratios_are_of_medians():
    times = {"a": timing.summarize([2.0]), "b": timing.summarize([8.0])}
    assert "4.00x" in timing.table(times, relative_to="a").splitlines()[2]


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="0 variants"):
        timing.measure({}, repeats=3)


def test_a_machine_without_a_load_average_has_none_in_its_record(monkeypatch):
    def absent():
        raise OSError("no such thing here")

    monkeypatch.setattr(os, "getloadavg", absent)
    assert timing.hardware()["load_before"] is None
    monkeypatch.setattr(os, "getloadavg", lambda: (1.234, 9.0, 9.0))
    assert timing.hardware()["load_before"] == 1.23
