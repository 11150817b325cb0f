import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy import stats

from engine import report
from engine.transfer import tables
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
    score = tables.scores(report.read([results]))["a"]["5"]
    assert score.mean == pytest.approx(np.mean(values))
    assert score.deviation == pytest.approx(np.std(values, ddof=1))
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in report.report([results])


def test_a_repeated_run_counts_once_with_its_newest_line(tmp_path):
    results = write(tmp_path / "r.jsonl", [line(10.0), line(20.0, seed=1), line(30.0)])
    score = tables.scores(report.read([results]))["a"]["5"]
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
    found = tables.scores(report.read([write(tmp_path / "r.jsonl", lines)]))
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
    found = tables.scores(report.read([write(tmp_path / "r.jsonl", rows)]))
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


def test_differences_to_a_source_are_of_the_same_seeds(tmp_path, capsys):
    rng = np.random.RandomState(0)
    ours, theirs = rng.uniform(50, 80, 5), rng.uniform(45, 60, 5)
    lines = [line(value, seed=seed) for seed, value in enumerate(ours)]
    lines += [line(value, seed=seed, pretrained_model="random") for seed, value in enumerate(theirs)]
    lines += [line(value, seed=seed, shot="full") for seed, value in enumerate(ours)]
    results = write(tmp_path / "r.jsonl", lines)
    said = report.report([results], against="random")
    expected = stats.ttest_rel(ours, theirs)
    low, high = expected.confidence_interval(0.95)
    assert f"{np.mean(ours - theirs):+.1f} ({low:+.1f} to {high:+.1f}) p {expected.pvalue:.3f}" in said
    assert "the 1 comparisons here" in said  # with all images there is nothing to compare with
    with pytest.raises(SystemExit):
        report.main([str(results), "--against", "imagenet"])
    assert "no source of digits; there are a, random" in capsys.readouterr().err


def test_networks_are_compared_with_themselves_only(tmp_path):
    lines = [
        line(value, seed=seed, network=network, pretrained_model=source)
        for network, source, values in (
            ("R50x1", "a", (10, 12)), ("R50x1", "random", (1, 2)), ("R152x4", "a", (20, 22)),
            ("R152x4", "random", (19, 21)),
        )
        for seed, value in enumerate(values)
    ]  # fmt: skip
    found = report.differences(report.read([write(tmp_path / "r.jsonl", lines)]), "random")
    assert {name: by_shots["5"].mean for name, by_shots in found.items()} == {"a (R50x1)": 9.5, "a (R152x4)": 1}


def test_the_scores_of_classes(tmp_path):
    lines = [
        line(50.0 + seed, seed=seed, interval=[45.0, 56.0], classes={"cat": 40.0 + seed, "dog": None})
        for seed in range(3)
    ]
    said = report.report([write(tmp_path / "r.jsonl", lines)], classes=True)
    assert "a score is ± 5.5 by its test images (95%)" in said
    assert re.search(r"cat +41.0 ± 1.0", said)
    assert re.search(r"dog +nan", said)
    assert "no result says how single classes" in report.report(
        [write(tmp_path / "o.jsonl", [line(1.0)])], classes=True
    )


def texts(axes):
    return [text.get_text() for text in axes.texts]


def drawn(tmp_path, monkeypatch, lines):
    """The figure of these results, before it becomes bytes."""
    kept = []
    monkeypatch.setattr(report.whole, "picture", lambda figure, path: kept.append(figure))
    text = report.report([write(tmp_path / "r.jsonl", lines)], tmp_path / "a.png")
    return kept[0], text


def test_the_majority_class_is_a_row_of_the_table_and_a_line_of_the_figure(tmp_path, monkeypatch):
    lines = [line(40.0, shot=shot, majority=44.625) for shot in ("1", "5")]
    lines += [line(60.0, shot="5", metric="mean_auc", dataset="other", majority=44.625) for _ in range(2)]
    figure, text = drawn(tmp_path, monkeypatch, lines)
    accuracy, auc = text.split("\n\n")
    (row,) = [row.split() for row in accuracy.splitlines() if row.startswith("majority class")]
    assert row[2:] == ["44.6", "44.6"] and "majority" not in auc
    (share,) = [one for one in figure.axes[0].lines if one.get_label() == "majority class"]
    assert list(share.get_ydata()) == [44.625] * 2
    assert [axes.get_ylabel() for axes in figure.axes][0] == "top-1, %"


def test_a_single_score_is_a_number_and_no_chart(tmp_path, monkeypatch):
    figure, _ = drawn(tmp_path, monkeypatch, [line(83.25, majority=20.0)])
    (axes,) = figure.axes
    assert not axes.lines and not axes.axison
    (said,) = texts(axes)
    assert "83.2" in said and "5 shots" in said and "majority class: 20.0" in said


def test_results_of_before_have_no_majority(tmp_path, monkeypatch):
    figure, text = drawn(tmp_path, monkeypatch, [line(40.0), line(50.0, shot="1")])
    assert "majority" not in text and not [one for one in figure.axes[0].lines if one.get_label() == "majority class"]


def test_test_sets_of_one_name_that_differ_are_told(tmp_path):
    with pytest.raises(UserError, match="40.00% and 50.00%.*data.name"):
        report.report([write(tmp_path / "r.jsonl", [line(1.0, majority=40.0), line(2.0, seed=1, majority=50.0)])])


def test_different_checkpoints_under_one_name_are_told_apart(tmp_path, capsys):
    lines = [line(10.0, weights="aa11"), line(20.0, weights="bb22"), line(30.0, weights="bb22"), line(5.0, seed=1)]
    lines += [line(70.0, pretrained_model="other", weights="cc33"), line(71.0, pretrained_model="other")]
    found = tables.scores(report.read([write(tmp_path / "r.jsonl", lines)]))
    assert {source: by["5"].mean for source, by in found.items()} == {
        "a [aa11]": 10.0, "a [bb22]": 30.0, "a": 5.0, "other": 71.0
    }  # fmt: skip
    warned = capsys.readouterr().err
    assert warned.startswith("warning: a stands for 2 different checkpoints") and warned.count("\n") == 1
