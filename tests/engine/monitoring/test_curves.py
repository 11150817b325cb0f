"""The picture of a run: what it says is what was measured."""

import json

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from engine.monitoring import curves


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """The panels that `plot` makes of events, by their y labels; the others under None."""

    def drawn(events, **more):
        figures = []
        whole = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), whole(self, *a, **k))[1])
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        curves.plot(tmp_path / "metrics.jsonl", tmp_path / "curves.png", "a run", **more)
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
        panels = {}
        for axes in figures[0].axes:
            panels.setdefault(axes.get_ylabel() or None, []).append(axes)
        return panels

    return drawn


def train(step, rate=0.1):
    return {"kind": "train", "step": step, "loss": 1 / step, "learning_rate": rate}


def val(step, **more):
    return {"kind": "val", "step": step, "loss": 2 / step, "top1": 50.0 + step, "images": 9} | more


def test_each_panel_has_labels_and_each_thing_a_colour_of_its_own(draw):
    panels = draw([train(1), train(2), val(1, mean_auc=60.0), val(2, mean_auc=61.0)], majority=44.5)
    assert set(panels) == {"loss", "learning rate", "evaluation, %"}
    ((loss,), (rate,), (scores,)) = panels.values()
    assert all(axes.get_xlabel() == "step" for axes in (loss, rate, scores))
    colours = {one.get_label(): to_hex(one.get_color()) for axes in (loss, scores) for one in axes.lines}
    assert list(colours) == ["training", "evaluation", "top-1", "mean AUC", "majority class"]
    things = {**colours, "rate": to_hex(rate.lines[0].get_color())}
    assert things.pop("top-1") == things["evaluation"]  # both are of the evaluation
    assert len(set(things.values())) == len(things)
    assert list(scores.lines[-1].get_ydata()) == [44.5, 44.5]


def test_without_an_evaluation_there_is_no_panel_for_it(draw):
    assert set(draw([train(1), train(2)])) == {"loss", "learning rate"}


def test_one_evaluation_is_a_number(draw):
    panels = draw([train(1), train(2), val(2)], majority=44.5)
    (axes,) = panels[None]
    assert not axes.lines and not axes.axison
    assert axes.texts[0].get_text() == "top-1 52.00%\nmajority class 44.50%\nstep 2"


def test_a_run_of_one_logged_step_has_numbers_only(draw):
    panels = draw([train(3, 0.5), val(3)])
    assert set(panels) == {None} and len(panels[None]) == 3
    assert "learning rate 0.5, step 3" in [axes.texts[0].get_text() for axes in panels[None]]


def test_the_majority_is_no_line_beside_auc_alone(draw):
    events = [train(1), train(2), *({"kind": "val", "step": step, "loss": 1.0, "mean_auc": 50.0} for step in (1, 2))]
    (axes,) = draw(events, majority=44.5)["evaluation, %"]
    assert [one.get_label() for one in axes.lines] == ["mean AUC"]


@pytest.mark.parametrize(
    ("values", "corners"),
    [
        ([1.0, 1.0, 0.1, 0.1, 0.01], [(2, 1.0), (4, 0.1)]),  # a schedule of steps
        ([0.0, 0.5, 1.0, 1.0, 0.1], [(4, 1.0)]),  # a warm-up rises in a line
        ([1.0, 0.9, 0.6, 0.2, 0.0], []),  # a cosine falls in one
        ([0.5] * 5, []),
        ([0.5], []),
        ([], []),
    ],
)
def test_falls_beside_constant_stretches_are_steps(values, corners):
    xs, ys = curves.stairs(range(len(values)), values)
    plain = list(zip(range(len(values)), values, strict=True))
    assert [pair for pair in zip(xs, ys, strict=True) if pair not in plain] == corners
    assert [pair for pair in zip(xs, ys, strict=True) if pair in plain] == plain
    assert xs == sorted(xs)
