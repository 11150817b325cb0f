"""A scaling sweep as a page."""

import pytest

from bench import scaling
from bench.model.facts import read_cluster
from tests.engine.page.test_page import Read


@pytest.fixture
def made(tmp_path, capsys):
    def run(*words):
        scaling.main(["--model-only", *words, "--plot", str(tmp_path / "a.png"), "--page", str(tmp_path / "a.html")])
        assert "page: " in capsys.readouterr().out
        return Read((tmp_path / "a.html").read_text())

    return run


def test_the_rows_of_the_table_and_the_papers_are_on_the_page(made):
    found = made("--gpus", "1024", "--model", "R152x4")
    _, _, paper = read_cluster("juwels_booster")
    last = next(row for row in found.rows if row[0] == "1,024")
    assert last[4] == f"{paper.rows[1024]:,.2f}"
    assert float(last[1].replace(",", "")) == pytest.approx(paper.rows[1024], rel=0.03)
    efficiency, rate = found.charts
    assert efficiency["log"] and rate["log"]
    (ours, theirs) = efficiency["series"]
    assert ours["points"][0] == [1, 100] and theirs["points"][0] == [1, 100]
    assert dict(theirs["points"])[1024] == pytest.approx(100 * paper.rows[1024] / paper.rows[1] / 1024, rel=1e-5)
    assert any(row[0] == "command" for row in found.rows)


def test_without_published_rows_ours_stand_alone(made):
    found = made("--gpus", "4", "--model", "R50x1", "--facts")
    assert [len(chart["series"]) for chart in found.charts] == [1, 1]
    assert ["GPUs", "images/s", "speedup", "E(N), %"] in found.rows
