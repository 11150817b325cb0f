"""Loaders beside each other as a figure: bars of the medians, lines from the lowest to the highest turn."""

import pytest
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

from bench.peers import turns


def test_bars_are_medians_and_lines_reach_from_the_lowest_to_the_highest(monkeypatch, tmp_path):
    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *to, **more: [kept.append(self), save(self, *to, **more)])
    rates = {
        "pack, host pipeline": {"images_per_second": 120.0, "low": 100.0, "high": 150.0},
        "other": {"images_per_second": 50.0, "low": 49.0, "high": 53.0},
    }
    about = {"what": "images", "threads": 1, "hardware": {"cpu": "Z80"}}
    turns.plot({"loaders": rates, **about}, tmp_path / "loader.png")
    (axes,) = kept[0].axes
    (bars,) = (one for one in axes.containers if isinstance(one, BarContainer))
    (errors,) = (one for one in axes.containers if isinstance(one, ErrorbarContainer))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["other", "pack, host pipeline"]  # fastest on top
    assert [bar.get_width() for bar in bars] == [50.0, 120.0]
    reach = [sorted(x for x, _ in segment) for segment in errors[2][0].get_segments()]
    assert reach == [[49.0, 53.0], [100.0, 150.0]]
    assert [text.get_text() for text in axes.texts] == ["50", "120"]


def test_each_turn_times_as_many_batches_as_asked_after_those_that_warm_up(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock) ** 2)
    stream = iter(range(100))
    took, _ = turns._time(stream, batches=4, warm=3)
    assert took == [1, 5, 9, 13]
    assert next(stream) == 7


@pytest.mark.parametrize("turns_of_each", [1, 3])
def test_a_ratio_is_of_the_same_turn(turns_of_each):
    rates = {"ours": [10.0, 20.0, 30.0], "theirs": [5.0, 5.0, 5.0]}
    done = {name: turns.Turns(values[:turns_of_each], [], [], []) for name, values in rates.items()}
    assert turns.ratios(done, "ours")["theirs"] == {
        "median": [2.0, 2.0, 4.0][turns_of_each - 1],
        "low": 2.0,
        "high": 2.0 * turns_of_each,
        "n": turns_of_each,
    }
