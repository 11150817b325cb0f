"""The scaling figure: efficiency and throughput, each of its rows where it belongs."""

import pytest

from bench.model import report
from bench.model.report import Row
from loaders.errors import UserError

RATES = {1: 100.0, 4: 380.0, 16: 1400.0}
ROWS = [Row(gpus, rate, rate / 100, rate / gpus, "modelled") for gpus, rate in RATES.items()]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    def drawn(*words):
        figures = []
        monkeypatch.setattr(report, "picture", lambda figure, *_, **__: figures.append(figure))
        report.figure(*words, tmp_path / "a.png", "a title")
        return figures[0]

    return drawn


def test_efficiency_is_over_the_logarithm_of_gpus_and_beside_the_throughput(draw):
    figure = draw(ROWS, {1: 200.0, 4: 700.0, 1024: 9e9})
    efficiency, throughput = figure.axes
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    assert (efficiency.get_yscale(), throughput.get_yscale()) == ("linear", "log")
    assert (efficiency.get_ylabel(), throughput.get_ylabel()) == ("efficiency E(N), %", "images/s")
    assert efficiency.get_ylim() == (70, 104)  # from the ten below the lowest ten
    percents, rates = (
        {one.get_label(): dict(zip(*one.get_data(), strict=True)) for one in axes.lines} for axes in figure.axes
    )
    assert percents["modelled"] == {1: 100.0, 4: 95.0, 16: 87.5} and rates["modelled"] == RATES
    assert percents["paper, Table 2"] == {1: 100.0, 4: 87.5} and rates["paper, Table 2"] == {1: 200.0, 4: 700.0}
    assert rates["ideal"] == {1: 100.0, 4: 400.0, 16: 1600.0}
    colours = [{one.get_label(): one.get_color() for one in axes.lines} for axes in figure.axes]
    assert colours[0] == colours[1] and len(set(colours[0].values())) == 3
    assert [text.get_text() for text in efficiency.texts] == ["100.0", "95.0", "87.5", "100.0", "87.5"]


def test_one_size_is_a_number(draw):
    figure = draw(ROWS[:1], None)
    assert not figure.axes
    assert figure.texts[-1].get_text() == "100.00 images/s on 1 GPU, modelled"


def test_a_name_that_ends_otherwise_is_told(tmp_path):
    with pytest.raises(UserError, match="does not end as a picture does"):
        report.figure(ROWS, None, tmp_path / "a.txt", "a title")
    assert not list(tmp_path.iterdir())
