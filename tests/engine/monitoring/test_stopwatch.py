import time

import pytest
import torch

from engine.monitoring import stopwatch
from engine.monitoring.stopwatch import Stopwatch


class Hands:
    """A clock that goes on only when it is told to; also of a GPU, whose events are passed when it says so."""

    def __init__(self, monkeypatch):
        self.now = self.cpu = 0.0
        self.passed = -1.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "process_time", lambda: self.cpu)
        hands = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = hands.now

            def query(self):
                return self.at <= hands.passed

            def elapsed_time(self, other):
                assert other.query(), "the host would wait"
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)


@pytest.fixture
def hands(monkeypatch):
    return Hands(monkeypatch)


def step(watch, hands, **seconds):
    watch.start()
    for phase in ("input", "compute", "wait", "optimizer"):
        hands.now += seconds.get(phase, 0.0)
        hands.cpu += seconds.get("busy", 0.0) if phase == "input" else 0.0
        watch.lap(phase)
    watch.end_step()


def test_phases_are_means_of_the_steps_since_the_last_reading(hands):
    watch = Stopwatch(torch.device("cpu"))
    step(watch, hands, input=1, compute=2, wait=3, optimizer=4, busy=0.5)
    hands.now += 100  # between steps
    step(watch, hands, input=3, compute=2, wait=1, optimizer=0, busy=2.5)
    found = watch.read()
    assert {name: found[name] for name in ("steps", "input", "compute", "wait", "optimizer", "decoding")} == {
        "steps": 2, "input": 2, "compute": 2, "wait": 2, "optimizer": 2, "decoding": 1.5}  # fmt: skip
    assert found["ahead"] != found["ahead"]
    step(watch, hands, compute=7)
    assert watch.read()["compute"] == 7


def test_what_is_usual_leaves_out_the_quickest_and_slowest_quarter(hands):
    watch = Stopwatch(torch.device("cpu"))
    for seconds in (1, 2, 3, 4, 5, 6, 7, 800):
        step(watch, hands, input=seconds, compute=1, optimizer=seconds, wait=0.5)
    found = watch.read()
    assert [found[name] for name in stopwatch.USUAL] == [4.5, 5.5, 0.5]


def test_what_no_phase_names_is_computing_and_laps_outside_of_steps_are_none(hands):
    watch = Stopwatch(torch.device("cpu"))
    watch.lap("wait")
    watch.end_step()
    assert watch.read()["steps"] == 0
    watch.start()
    hands.now += 1
    watch.lap("input")
    hands.now += 5  # a step that a graph does as a whole
    watch.end_step()
    found = watch.read()
    assert (found["input"], found["compute"]) == (1, 5)


def test_nothing_was_measured_where_there_was_no_step():
    found = Stopwatch(torch.device("cpu")).read()
    assert found.pop("steps") == 0
    assert all(value != value for value in found.values())


def test_events_of_a_gpu_are_read_when_it_has_passed_them(hands):
    """The event class of this test fails where the host would have to wait."""
    watch = Stopwatch(torch.device("cuda"))
    step(watch, hands, input=1, compute=2, wait=1, optimizer=1)
    assert watch.read()["steps"] == 0
    hands.passed = hands.now
    step(watch, hands, input=10, compute=10)
    found = watch.read()
    assert (found["steps"], found["input"], found["compute"]) == (1, 1, 2)
    hands.passed = hands.now
    assert watch.read()["compute"] == 10


@pytest.mark.parametrize("behind", [True, False])
def test_the_host_is_ahead_where_the_device_has_not_done_its_backward_pass_when_a_step_is_issued(hands, behind):
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(4):
        if behind:
            hands.passed = hands.now + 1e9
        step(watch, hands, compute=1)
    assert watch.read()["ahead"] == (0 if behind else 1)


def test_laps_of_a_graph_that_is_being_recorded_are_none(hands):
    watch = Stopwatch(torch.device("cuda"))
    watch.start()
    hands.capturing = True
    watch.lap("compute")
    hands.capturing = False
    hands.now += 3
    watch.end_step()
    hands.passed = hands.now
    assert watch.read()["compute"] == 3


def test_copies_are_counted_in_both_directions(monkeypatch):
    moments = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(moments)))
    assert stopwatch.copied_bytes_per_second(torch.device("cpu"), size=1000) == 2000
