import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.monitoring import ranks
from engine.monitoring.diagnosis import COLUMNS
from engine.monitoring.ranks import RankTimes, Setting
from engine.monitoring.stopwatch import USUAL
from loaders.errors import UserError

SETTING = Setting(["a", "a", "b"], "cpu", 2, 1.0, 1e10, "train.", 8, "R8x0.25-8px", 8, "float32", "none")


class Three(Communicator):
    """Rank 0 of three, the others of which say what a test makes them say."""

    def __init__(self):
        super().__init__(Launch("alone"))
        self.size, self.others = 3, lambda row: np.vstack([row, row])

    def start_sum_(self, tensor, name):
        assert tensor.view(3, -1)[self.rank :: 3].abs().nansum() == tensor.abs().nansum()  # nothing of theirs

        def arrive():
            rows = tensor.view(3, -1)
            mine = rows[self.rank : self.rank + 1].numpy().copy()
            rows.copy_(torch.from_numpy(np.vstack([mine, self.others(mine)])))

        return SimpleNamespace(wait=arrive)


class Watch:
    """Says always the same."""

    def __init__(self, **more):
        self.said = {"input": 0.01, "compute": 0.08, "wait": 0.005, "optimizer": 0.004, "steps": 10, "decoding": 0.01,
                     "ahead": math.nan, **dict(zip(USUAL, (0.01, 0.084, 0.005), strict=True))} | more  # fmt: skip

    def read(self):
        return dict(self.said)


def times(folder=None, said=None, comm=None):
    return RankTimes(SETTING, comm or Three(), 5, folder, torch.zeros(100), launching=0.002,
                     say=[].append if said is None else said.append)  # fmt: skip


def log(hook, step, watch=None, step_seconds=0.1):
    """A logged step and the one after it, when the ranks' figures have come."""
    meter = SimpleNamespace(newest={"images_per_second": 24 / step_seconds})
    for each in (step, step + 1):
        hook.after_step(SimpleNamespace(step=each, global_batch=24, phases=watch or Watch(), meter=meter))


def lines(folder):
    return [json.loads(line) for line in (folder / ranks.FILE).read_text().splitlines()]


def test_a_run_leaves_a_line_for_its_start_and_one_for_each_interval_but_the_first(tmp_path):
    hook = times(tmp_path)
    for step in (10, 20, 30):
        log(hook, step)
    start, *rows = lines(tmp_path)
    assert start == {"kind": "run", "step": 5, **asdict(SETTING)}
    assert [row["step"] for row in rows] == [20, 30]
    assert rows[0] == {
        "kind": "ranks", "step": 20, "steps": 10, "input": [0.01] * 3, "compute": [0.08] * 3, "wait": [0.005] * 3,
        "optimizer": [0.004] * 3, "other": [0.001] * 3, "decoding": [0.01] * 3, "launching": [0.002] * 3,
        **dict.fromkeys(("ahead", "clock", "most_clock", "power", "temperature", "throttled"), [None] * 3)}  # fmt: skip


def test_means_are_over_steps_and_leave_out_the_first_interval_where_there_are_others():
    hook = times()
    assert hook.table is None
    log(hook, 10, Watch(compute=50.0))
    assert hook.table["compute"].tolist() == [50.0] * 3
    log(hook, 20, Watch(compute=1.0, steps=30))
    log(hook, 30, Watch(compute=5.0, steps=10))
    assert hook.table["compute"].tolist() == [2.0] * 3
    assert tuple(hook.table) == COLUMNS


def test_what_was_sent_is_waited_for_a_step_later_or_at_the_end():
    comm, waits = Three(), []
    comm.start_sum_ = lambda tensor, name: SimpleNamespace(wait=lambda: waits.append(name))
    hook = times(comm=comm)
    trainer = SimpleNamespace(step=1, global_batch=24, phases=Watch(), meter=SimpleNamespace(newest=None))
    for logged, waited in ((True, 0), (False, 1), (False, 1), (True, 1), (True, 2)):
        if logged:
            trainer.meter.newest = {"images_per_second": 240.0}
        hook.after_step(trainer)
        assert len(waits) == waited
    hook.finish(trainer)
    assert len(waits) == 3


def test_nothing_is_sent_while_the_meter_is_not_read():
    comm = Three()
    comm.start_sum_ = lambda *given: pytest.fail("asked")
    hook = times(comm=comm)
    hook.after_step(SimpleNamespace(step=1, meter=SimpleNamespace(newest=None)))


def test_an_interval_without_steps_does_not_count():
    hook = times()
    log(hook, 10, Watch(steps=0, compute=math.nan))
    assert hook.table is None


def test_a_rank_that_lags_is_told_and_kept_and_so_is_its_end(tmp_path):
    said, comm = [], Three()
    hook = times(tmp_path, said, comm)
    usual = ranks._ROW.index("usual_compute")

    def late(row):
        rows = np.vstack([row, row])
        rows[1, usual] += slow
        return rows

    comm.others = late
    for step in range(10, 260, 10):
        slow = 0.03 if step <= 100 else 0.0
        log(hook, step, Watch(usual_wait=0.03))
    assert len(said) == 2
    assert said[0].startswith("step 60: rank 2 on b lags: all wait for its own computing")
    assert "rank 2 lags no more" in said[1]
    events = [line for line in lines(tmp_path) if line["kind"] == "lagging"]
    assert [(event["step"], event["rank"]) for event in events] == [(60, 2), (events[1]["step"], None)]
    found = ranks.read(tmp_path / ranks.FILE)
    assert found.named[0] == said[0]
    assert found.named[1].endswith("none lags any more")


def test_a_finding_comes_at_the_end_from_the_rank_that_leads(monkeypatch):
    said = []
    hook = times(said=said)
    hook.finish(None)
    assert said == []
    for step in (10, 20):
        log(hook, step, Watch(input=0.2))
    hook.finish(None)
    assert said[0].startswith("input-bound: ")
    comm = Three()
    comm.rank = 1
    other = times(said=said, comm=comm)
    log(other, 10)
    other.finish(None)
    assert len(said) == 1


def test_long_runs_write_fewer_and_fewer_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "_DENSE", 4)
    hook = times(tmp_path)
    for step in range(1, 200):
        log(hook, step)
    rows = [line for line in lines(tmp_path) if line["kind"] == "ranks"]
    assert 20 < len(rows) < 60
    assert [row["step"] for row in rows][:4] == [2, 3, 4, 5]
    assert sum(row["steps"] for row in rows) >= 10 * 198 - 150
    assert rows[-1]["steps"] > 50


def test_what_was_written_is_read_back_of_the_last_start(tmp_path):
    first, second = times(tmp_path), None
    for step in (10, 20):
        log(first, step, Watch(compute=9.0))
    second = times(tmp_path)
    for step in (10, 20, 30):
        log(second, step, Watch(compute=0.5))
    found = ranks.read(tmp_path / ranks.FILE)
    assert asdict(found.known) == asdict(SETTING)
    assert found.table["compute"].tolist() == [0.5] * 3
    assert np.isnan(found.table["clock"]).all()
    assert found.link is None


@pytest.mark.parametrize(
    "line",
    [b'{"kind": "ranks", "st', b"[]", b"7", b"\xff\xfe", b'{"kind": "ranks"}',
     b'{"kind": "lagging", "step": 1, "rank": 9}',
     b'{"kind": "lagging", "step": 1, "rank": 1, "reason": "mood", "share": 1}', b'{"kind": "run", "step": 1}',
     b'{"kind": "ranks", "step": 1, "steps": 1, "input": "abc"}', b"[" * 10000],
)  # fmt: skip
def test_lines_that_are_none_are_passed_over(tmp_path, line):
    hook = times(tmp_path)
    for step in (10, 20):
        log(hook, step)
    path = tmp_path / ranks.FILE
    before = ranks.read(path)
    path.write_bytes(path.read_bytes() + line + b"\n")
    after = ranks.read(path)
    assert after.table["compute"].tolist() == before.table["compute"].tolist()
    assert after.events == []


def test_a_run_that_is_started_again_when_its_work_is_done_keeps_what_it_said(tmp_path):
    hook = times(tmp_path)
    for step in (10, 20):
        log(hook, step)
    before = ranks.read(tmp_path / ranks.FILE)
    times(tmp_path)
    after = ranks.read(tmp_path / ranks.FILE)
    assert after.table["compute"].tolist() == before.table["compute"].tolist() and after.known == before.known


def test_a_file_that_says_nothing_is_refused(tmp_path):
    times(tmp_path)
    with pytest.raises(UserError, match="logged twice or more"):
        ranks.read(tmp_path / ranks.FILE)
    with pytest.raises(UserError, match="cannot be read"):
        ranks.read(tmp_path / "absent.jsonl")


def test_a_line_that_a_killed_run_was_writing_does_not_take_the_next_one_with_it(tmp_path):
    (tmp_path / ranks.FILE).write_bytes(b'{"kind": "ranks", "ste')
    times(tmp_path)
    assert lines(tmp_path)[0]["kind"] == "run"


def test_the_setting_is_that_of_the_slowest_and_most_crowded_rank(monkeypatch):
    monkeypatch.setattr(ranks, "copied_bytes_per_second", lambda device: 7.0)
    comm = Three()
    comm.exchange = lambda value: [("a", 8, 9.0), ("a", 8, 5.0), ("b", 6, 8.0)]
    known = ranks.setting(comm, torch.device("cpu"), threads=2, keys="", images=8, network="n", size=8, dtype="float32",
                          recompute="none")  # fmt: skip
    assert known == replace(known, hosts=["a", "a", "b"], cores=4.0, copied_bytes_per_s=5.0, device="cpu")
    assert known.facts(10.0).moving == pytest.approx(16.0)
    assert math.isnan(known.facts().moving)
