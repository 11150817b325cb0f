import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from engine.monitoring import metrics
from engine.whole import json_text
from tests.conftest import ROOT


def test_a_resumed_run_has_each_step_once_and_a_cut_line_does_no_harm(tmp_path):
    log = metrics.MetricLog(tmp_path, 0)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 9.0)):
        log.write("train", step, {"loss": loss, "learning_rate": 0.1})
    log.write("val", 3, {"loss": 1.0, "top1": 50.0})
    log.close()
    log = metrics.MetricLog(tmp_path, 2)
    log.write("train", 3, {"loss": 1.5, "learning_rate": 0.1})
    log.close()
    with open(log.path, "a") as file:
        file.write('{"kind": "train", "st')
    events = metrics.read(log.path)
    assert [(e["kind"], e["step"], e["loss"]) for e in events] == [
        ("train", 1, 3.0),
        ("train", 2, 2.0),
        ("train", 3, 1.5),
        ("val", 3, 1.0),
    ]


def test_what_is_no_number_is_null_in_the_file_and_nan_when_read(tmp_path):
    """JSON has neither NaN nor infinities; a strict reader refuses them."""
    log = metrics.MetricLog(tmp_path, 0)
    log.write(
        "train", 1, {"loss": float("nan"), "learning_rate": 0.5, "norm": float("-inf"), "other": np.float64("inf")}
    )
    log.close()

    def refuse(word):
        raise AssertionError(word)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "kind": "train", "step": 1, "loss": None, "learning_rate": 0.5, "norm": None, "other": None
    }  # fmt: skip
    (event,) = metrics.read(tmp_path / "metrics.jsonl")
    assert np.isnan(event["loss"]) and event["learning_rate"] == 0.5


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "train", "step": "1", "loss": 1.0, "images_per_second": 1.0, "data_wait": 0.1, "learning_rate": 0.1},
        {"kind": "other", "step": 1, "loss": 1.0},
        {"kind": "val", "step": True, "loss": 1.0},
        {"kind": "val", "step": 1, "loss": "low"},
        ["val", 1, 1.0],
    ],
)
def test_a_line_that_is_no_event_is_passed_over(tmp_path, line):
    sound = {"kind": "val", "step": 2, "loss": 0.5, "images": 3.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(sound) + "\n")
    assert metrics.read(tmp_path / "metrics.jsonl") == [sound]


def test_json_of_nested_values():
    value = {"a": [float("nan"), (1.5, {"b": float("inf")})], "c": True, "d": 3, "e": "NaN", "f": None}
    expected = {"a": [None, [1.5, {"b": None}]], "c": True, "d": 3, "e": "NaN", "f": None}
    assert json.loads(json_text(value)) == expected
    assert json_text({"a": 0.1 + 0.2}) == json.dumps({"a": 0.1 + 0.2})


def board(folder):
    """What TensorBoard itself shows: tag → [(step, value)]."""
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(("saved", "logged"), [(2, 4), (0, 3), (4, 4)])
def test_a_resumed_run_shows_each_step_once_in_tensorboard(tmp_path, saved, logged):
    """Killed after `logged` steps, it goes on from `saved`; a finished run (4 of 4) is evaluated again."""
    for first, last, loss in ((0, logged, 9.0), (saved, 4, 1.0)):
        log = metrics.MetricLog(tmp_path, first)
        for step in range(first + 1, last + 1):
            log.write("train", step, {"loss": loss})
        log.write("val", last, {"top1": loss})
        log.close()
    assert board(tmp_path) == {
        "train/loss": [(step, 9.0 if step <= saved else 1.0) for step in range(1, 5)],
        "val/top1": [(4, 9.0 if saved == 4 else 1.0)],
    }


LINE = '{"kind": "train", "step": 1, "loss": 2.5}'


@pytest.mark.parametrize("kept", [*range(len(LINE) + 1)])
def test_what_a_kill_left_of_a_line_does_not_take_the_next_with_it(tmp_path, kept):
    (tmp_path / "metrics.jsonl").write_text(f"{LINE}\n{LINE.replace('1', '2')[:kept]}")
    log = metrics.MetricLog(tmp_path, 2)
    log.write("train", 3, {"loss": 0.5})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == ([1, 2, 3] if kept == len(LINE) else [1, 3])


def test_the_commit_is_the_one_that_git_names(monkeypatch):
    monkeypatch.delenv("BOOSTERBIT_COMMIT", raising=False)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("this is no git checkout")
    assert metrics.commit().rstrip("+") == head.stdout[:12]
    monkeypatch.setenv("BOOSTERBIT_COMMIT", "told")
    assert metrics.commit() == "told"


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n" * 2,
            "AMD EPYC (family 25, model 17)",
        ),
        ("model name\t: ARM: Neoverse-N1\n", "ARM: Neoverse-N1"),
        ("processor\t: 0\n", "said elsewhere"),
        (None, "said elsewhere"),
    ],
)
def test_a_processor_is_told_from_others_of_its_name(monkeypatch, info, name):
    def read_text(path, encoding):
        if info is None:
            raise FileNotFoundError(path)
        return info

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(metrics.platform, "processor", lambda: "said elsewhere")
    assert metrics.processor() == name
