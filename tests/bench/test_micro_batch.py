import json
import math

import pytest

from bench import micro_batch as bench
from engine.tuning import micro_batch


class Trial:
    """Counted: 10 ms a pass and 1 ms an image."""

    def __init__(self, parts, comm):
        self.parts = parts

    def seconds(self, size, passes):
        return 0.010 + 0.001 * size


@pytest.mark.parametrize(("chosen", "percent"), [(64, 100.0), (16, 100 * 16 / 26 / (64 / 74))])
def test_what_is_chosen_stands_beside_the_best(digits, tmp_path, monkeypatch, capsys, chosen, percent):
    monkeypatch.setattr(micro_batch, "fastest", lambda parts, comm: (chosen, "said"))
    monkeypatch.setattr(micro_batch, "Trial", Trial)
    words = ["demo", f"data.train={digits / 'low-train.h5'}", "--turns", "2", "--out", str(tmp_path / "n" / "out.json")]
    assert bench.main(words) == 0
    assert f"chosen: {percent:.1f}% of the best" in capsys.readouterr().out
    record = json.loads((tmp_path / "n" / "out.json").read_text())
    assert (record["chosen"], record["best"], record["n"]) == (chosen, 64, 2)
    assert math.isclose(record["of_the_best_percent"], percent)
    assert list(record["images_per_second"]) == ["1", "2", "4", "8", "16", "32", "64"]
    assert record["supports"] == ["monitoring"]


@pytest.mark.parametrize("words", [["absent"], ["demo", "--turns", "0"], ["demo"]])
def test_bad_input_is_told(words, capsys):
    assert bench.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")
