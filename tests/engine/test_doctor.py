"""Staged runs whose clock counts instead of measuring: what takes how long is known, and nothing else takes time."""

import json
import os
import sys
import time

import pytest

from engine import doctor, pretrain
from engine.comm.communicator import Communicator
from engine.comm.launch import Launch
from engine.config.loading import load
from engine.config.schema import PretrainConfig
from engine.monitoring import ranks
from engine.network.bit import Bit
from loaders.errors import UserError
from loaders.pipelines.host import HostPipeline
from tests.conftest import run_words

STEPS = ["schedule.epochs=null", "schedule.steps=6", "schedule.warmup_steps=2", "train.log_every=2", "data.val=null",
         "data.backend=host", "comm.backend=local"]  # fmt: skip


class Counted:
    """Seconds that passed, and that processors were busy for this process, by what was done."""

    def __init__(self, monkeypatch, *, reading=0.0, decoding=0.0, launching=0.001, image=0.002):
        self.wall = self.busy = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.wall)
        monkeypatch.setattr(time, "process_time", lambda: self.busy)
        images, forward = HostPipeline.next_images, Bit.forward

        def next_images(pipeline):
            found = images(pipeline)
            self.wall += len(found) * (reading + decoding / pipeline._threads)
            self.busy += len(found) * decoding
            return found

        def counted_forward(network, batch):
            self.wall += launching + image * len(batch)
            return forward(network, batch)

        monkeypatch.setattr(ranks, "copied_bytes_per_second", lambda device: 1e10)
        monkeypatch.setattr(HostPipeline, "next_images", next_images)
        monkeypatch.setattr(Bit, "forward", counted_forward)


class Pair(Communicator):
    """Rank 0 of two, the other of which computes 100 ms longer: for its gradients all wait."""

    def __init__(self, counted):
        super().__init__(Launch("alone"))
        self.size, self._counted = 2, counted

    def start_sum_(self, tensor, name):
        counted = self._counted

        class Handle:
            def wait(self):
                counted.wall += 0.1 if name == "gradients.0" else 0.0
                if name == "timing":
                    rows = tensor.view(2, -1)
                    rows[1] = rows[0]
                    for column, more in {
                        "compute": 0.1,
                        "usual_compute": 0.1,
                        "wait": -0.1,
                        "usual_wait": -0.1,
                    }.items():
                        rows[1, ranks._ROW.index(column)] += more

        return Handle()

    def exchange(self, value):
        return [value, value]


STAGED = {
    "a slow disk": ("input-bound", "they wait for bytes; change the storage", {"reading": 0.004}, []),
    "one decoding thread": ("input-bound", "1.0 of 1 decoding threads", {"decoding": 0.004}, ["data.threads=1"]),
    "a slow rank": ("slow rank", "rank 1", {}, []),
    "tiny batches": ("launch-bound", "micro_batch=auto", {"image": 0.00001}, ["train.accumulate=8"]),
    "healthy": ("healthy", "of a step", {"reading": 0.0001, "decoding": 0.0001}, []),
}


@pytest.mark.parametrize("case", STAGED)
def test_the_finding_of_a_staged_run(digits, tmp_path, monkeypatch, capsys, case):
    kind, words, costs, settings = STAGED[case]
    counted = Counted(monkeypatch, **costs)
    packs = [f"data.train={digits / 'low-train.h5'}", f"folder={tmp_path / 'run'}"]
    config = load(PretrainConfig, "demo", [*packs, *STEPS, *settings], "pretrain")
    comm = Pair(counted) if case == "a slow rank" else Communicator(Launch("alone"))
    pretrain.pretrain(config, comm)
    told = capsys.readouterr().out
    assert f"\n{kind}: " in told
    assert words in told
    doctor.main([str(tmp_path / "run")])
    later = capsys.readouterr().out
    assert later.splitlines()[0].split()[:3] == ["rank", "host", "input"]
    assert f"\n{kind}: " in later


def test_a_run_that_says_nothing_of_its_time_is_refused(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SystemExit) as ended:
            doctor.main([str(place)])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(UserError, match="no folder"):
        doctor.of_run(tmp_path / "absent")


@pytest.mark.parametrize("words", [["a", "b"], []])
def test_one_run_is_asked_for(words):
    with pytest.raises(SystemExit) as ended:
        doctor.main(words)
    assert ended.value.code == 2


def test_head_room_compares_the_same_batch_with_real_input(digits, tmp_path, monkeypatch, capsys):
    """Counted: a batch of 64 is computed in 129 ms and read in 256 ms."""
    Counted(monkeypatch, reading=0.004)
    packs = [f"data.train={digits / 'low-train.h5'}", f"folder={tmp_path / 'run'}"]
    config = load(PretrainConfig, "demo", [*packs, *STEPS], "pretrain")
    doctor.headroom(config, Communicator(Launch("alone")), seconds=1.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-2:] == [f"{64 / 0.129:.1f}", "100%"]
    assert lines[2].split()[-2:] == [f"{64 / (0.129 + 0.256):.1f}", "34%"]
    assert lines[3].startswith("input-bound: ")
    assert not (tmp_path / "run").exists()


def test_head_room_on_two_ranks(digits, tmp_path):
    words = ["-m", "engine.doctor", "--now", "demo", "--ranks", "2", f"data.train={digits / 'low-train.h5'}",
             "data.val=null", "schedule.epochs=null", "schedule.steps=12", "schedule.warmup_steps=0",
             f"folder={tmp_path / 'run'}"]  # fmt: skip
    done = run_words([sys.executable, *words], dict(os.environ), 120)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[-1] for row in rows if "ranks" in row or "alone" in row][0] == "100%"
    assert sum("2" in row and "ranks" in row for row in rows) == 2
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_is_refused(digits, tmp_path):
    comm = Communicator(Launch("alone"))
    comm.size = 3
    comm.exchange = lambda value: [value] * 3
    config = load(PretrainConfig, "demo", [f"data.train={digits / 'low-train.h5'}", *STEPS], "pretrain")
    with pytest.raises(UserError, match="does not divide over 3 ranks"):
        doctor.headroom(config, comm)


def test_what_a_run_keeps_is_a_line_of_json_each(digits, tmp_path):
    packs = [f"data.train={digits / 'low-train.h5'}", f"folder={tmp_path / 'run'}"]
    pretrain.pretrain(load(PretrainConfig, "demo", [*packs, *STEPS], "pretrain"), Communicator(Launch("alone")))
    events = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["run", "ranks", "ranks"]
    assert events[0]["images"] == 64
