import json

import numpy as np

from engine.training import metrics
from engine.whole import json_text


def test_a_resumed_run_has_each_step_once_and_a_cut_line_does_no_harm(tmp_path):
    log = metrics.MetricLog(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 9.0)):
        log.write("train", step, {"loss": loss, "learning_rate": 0.1})
    log.write("val", 3, {"loss": 1.0, "top1": 50.0})
    log.close()
    log = metrics.MetricLog(tmp_path)  # resumed from step 2
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
    metrics.plot_curves(log.path, tmp_path / "curves.png", "a run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_number_is_null_in_the_file_and_nan_when_read(tmp_path):
    """JSON has neither NaN nor infinities; a strict reader refuses them."""
    log = metrics.MetricLog(tmp_path)
    log.write("train", 1, {"loss": float("nan"), "lr": 0.5, "norm": float("-inf"), "other": np.float64("inf")})
    log.close()

    def refuse(word):
        raise AssertionError(word)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "kind": "train", "step": 1, "loss": None, "lr": 0.5, "norm": None, "other": None
    }  # fmt: skip
    (event,) = metrics.read(tmp_path / "metrics.jsonl")
    assert np.isnan(event["loss"]) and event["lr"] == 0.5


def test_json_of_nested_values():
    value = {"a": [float("nan"), (1.5, {"b": float("inf")})], "c": True, "d": 3, "e": "NaN", "f": None}
    expected = {"a": [None, [1.5, {"b": None}]], "c": True, "d": 3, "e": "NaN", "f": None}
    assert json.loads(json_text(value)) == expected
    assert json_text({"a": 0.1 + 0.2}) == json.dumps({"a": 0.1 + 0.2})
