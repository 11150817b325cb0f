"""Steps beside each other, turn by turn: what counts, and against what."""

import pytest
import torch

from bench.measured import compared, timing


def test_turns_that_warm_up_do_not_count_and_ratios_are_of_the_same_turn(monkeypatch, capsys):
    """Milliseconds of each turn; the first two warm up."""
    scripted = iter([{compared.OURS: a, "theirs": b} for a, b in ((999, 1), (999, 1), (2, 4), (4, 4), (10, 30))])

    def measure(variants, *, repeats, device, warmup):
        assert (list(variants), repeats, warmup) == ([compared.OURS, "theirs"], 1, 0)
        return {name: timing.summarize([float(value)]) for name, value in next(scripted).items()}

    monkeypatch.setattr(timing, "measure", measure)
    variants = dict.fromkeys([compared.OURS, "theirs"], lambda: None)
    times, ratios = compared._turns(variants, repeats=3, warmup=2, device=torch.device("cpu"))
    assert {name: (t.median, t.best, t.n) for name, t in times.items()} == {
        compared.OURS: (4.0, 2.0, 3),
        "theirs": (4.0, 4.0, 3),
    }
    assert ratios == {"theirs": {"median": 2.0, "low": 1.0, "high": pytest.approx(3.0), "n": 3}}
    said = capsys.readouterr().err
    assert said.count("\r") == 4 and said.endswith("turn 5 of 5\n")
