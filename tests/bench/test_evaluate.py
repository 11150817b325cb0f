import json

import numpy as np
import pytest

from bench import evaluate
from engine.statistics.scores import of_all

SMALL = ["--images", "300", "--labels", "3", "--resamples", "40", "--loop", "2", "--repeats", "2"]


@pytest.mark.parametrize("more", [[], ["--balanced", "--per-group", "3"]])
def test_the_record(tmp_path, capsys, more):
    evaluate.main([*SMALL, *more, "--json", str(tmp_path / "result.json")])
    record = json.loads((tmp_path / "result.json").read_text())
    ours, loop = (record["milliseconds"][name] for name in ("40 resamples", "scikit-learn, 2 resamples"))
    assert record["ours_s"] == pytest.approx(ours["median"] / 1e3, abs=1e-3)
    assert record["times_as_fast"] == pytest.approx(loop["median"] * 20 / ours["median"], abs=0.06)
    assert record["largest_difference"] < 1e-12
    assert (record["groups"], record["supports"]) == (100 if more else 300, ["evaluating"])
    assert "times as long" in capsys.readouterr().out
    assert set(more) <= set(record["command"].split())


def test_made_up_labels_are_as_frequent_as_said():
    rare = evaluate.made_up(20_000, 5, 1, balanced=False)
    assert rare.truth.mean(0) == pytest.approx(np.geomspace(0.003, 0.24, 5), abs=0.01)
    half = evaluate.made_up(20_000, 2, 1, balanced=True)
    assert half.truth.mean(0) == pytest.approx([0.5, 0.5], abs=0.02)
    assert (of_all(half)["auc"] > 0.7).all()
