import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from engine import report
from loaders.errors import UserError


def line(value, **changes):
    fields = {"metric_value": value, "metric": "top1", "seed": 0, "shot": "5", "pretrained_model": "a",
              "dataset": "digits", "network": "R50x1"}  # fmt: skip
    return fields | changes


def write(path, lines):
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def test_mean_and_sample_deviation_are_numpys(tmp_path):
    values = [90.25, 91.5, 87.125, 93.0]
    results = write(tmp_path / "r.jsonl", [line(value, seed=seed) for seed, value in enumerate(values)])
    score = report.scores(report.read([results]))["a"]["5"]
    assert score.mean == pytest.approx(np.mean(values))
    assert score.deviation == pytest.approx(np.std(values, ddof=1))
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in report.report([results])


def test_a_repeated_run_counts_once_with_its_newest_line(tmp_path):
    results = write(tmp_path / "r.jsonl", [line(10.0), line(20.0, seed=1), line(30.0)])
    score = report.scores(report.read([results]))["a"]["5"]
    assert (score.mean, score.seeds) == (25.0, 2)


def test_targets_sources_and_shots_stay_apart(tmp_path):
    lines = [line(50.0, shot="full"), line(1.0, shot="100"), line(2.0, pretrained_model="random", shot="5"),
             line(70.0, dataset="chest", metric="mean_auc")]  # fmt: skip
    text = report.report([write(tmp_path / "r.jsonl", lines)], tmp_path / "figures" / "r.png")
    digits, chest = text.split("\n\n")
    assert [word for word in digits.splitlines()[0].split() if word in ("5", "100", "full")] == ["5", "100", "full"]
    assert "random weights" in digits
    assert "mean AUC" in chest
    assert "70.0" in chest
    assert (tmp_path / "figures" / "r.png").read_bytes().startswith(b"\x89PNG")


def test_networks_of_one_source_are_not_one_mean(tmp_path):
    lines = [line(50.0, pretrained_model="random"), line(70.0, pretrained_model="random", network="R152x4"), line(90.0)]
    found = report.scores(report.read([write(tmp_path / "r.jsonl", lines)]))
    assert {source: by["5"].mean for source, by in found.items()} == {
        "random (R50x1)": 50.0, "random (R152x4)": 70.0, "a": 90.0
    }  # fmt: skip
    assert "random weights (R152x4)" in report.report([tmp_path / "r.jsonl"])


def test_the_published_results_are_read_as_they_are(tmp_path, shared):
    """Against the published files' own rows, the last of each (model, shots, seed) as their notes say."""
    published = sorted((shared / "reference" / "results").glob("*.csv"))[0]
    with open(published) as file:
        rows = [row | {"metric_value": float(row["metric_value"])} for row in csv.DictReader(file)]
    last = {(r["pretrained_model"], r["shot"], r["seed"]): r["metric_value"] for r in rows}
    model, shots, _ = next(iter(last))
    expected = np.mean([value for key, value in last.items() if key[:2] == (model, shots)])
    found = report.scores(report.read([write(tmp_path / "r.jsonl", rows)]))
    assert found[model][shots].mean == pytest.approx(expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "r.jsonl"), ("", "no results"), ("hello\n", "line 1"), ("[1]\n", "line 1"), ('{"seed": 1}\n', "metric")],
)
def test_what_is_not_a_results_file_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        report.report([tmp_path / "r.jsonl"])


def test_a_source_looks_alike_in_all_panels_and_in_the_legend(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, place, **_: (place.touch(), drawn.append(figure)))
    lines = [line(50.0, pretrained_model="first"), line(60.0, pretrained_model="both"),
             line(80.0, dataset="chest", pretrained_model="both"),
             line(70.0, dataset="chest", pretrained_model="last")]  # fmt: skip
    report.report([write(tmp_path / "r.jsonl", lines)], tmp_path / "r.png")
    panels = [
        {bars.get_label(): to_hex(bars.lines[0].get_color()) for bars in axes.containers} for axes in drawn[0].axes
    ]
    entries = zip(drawn[0].legends[0].get_texts(), drawn[0].legends[0].legend_handles, strict=True)
    legend = {text.get_text(): to_hex(handle.get_edgecolor()[0]) for text, handle in entries}
    assert [sorted(panel) for panel in panels] == [["pre-trained: both", "pre-trained: first"],
                                                   ["pre-trained: both", "pre-trained: last"]]  # fmt: skip
    assert panels[0] | panels[1] == panels[1] | panels[0] == legend
    assert len(set(legend.values())) == 3


@pytest.mark.parametrize("picture", ["r.jsonl/r.png", "r.xyz", "", "/proc/r.png"])
def test_a_place_where_no_picture_can_be_ends_with_one_line_and_code_2(tmp_path, monkeypatch, capsys, picture):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.jsonl", [line(1.0)])
    with pytest.raises(SystemExit) as ended:
        report.main(["r.jsonl", "--plot", picture])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_reader_that_leaves_ends_a_command_without_a_word(tmp_path):
    """As `… | head` does, where more is printed than a pipe holds."""
    lines = [line(1.0, dataset=f"target{k}" + "x" * 1000) for k in range(500)]
    command = [sys.executable, "-m", "engine.report", write(tmp_path / "r.jsonl", lines)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline().startswith("target0x")
        program.stdout.close()
        assert (program.stderr.read(), program.wait()) == ("", 141)
