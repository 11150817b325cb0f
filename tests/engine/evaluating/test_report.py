import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, recall_score, roc_auc_score

from engine.evaluating import assess, evaluation, figures, tables
from engine.evaluating.report import Asked
from engine.predicting.table import Predictions, write
from engine.statistics import thresholds
from loaders.errors import UserError
from tests.support.predictions import NAMES, classes, labels


@pytest.fixture
def file(tmp_path):
    def save(name, predictions):
        write(tmp_path / name, predictions, {})
        return tmp_path / name

    return save


FEW = {"resamples": 120}


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_a_table_holds_the_scores_and_what_they_are_compared_with(file, tmp_path):
    given = labels(0)
    found = assess([file("a.csv", given)], Asked(threshold=0.5, **FEW))
    written = {path.name for path in found.save(tmp_path / "out", "png")}
    assert written == {"scores.csv", "scores.md", "about.json", "roc.png", "precision-recall.png", "reliability.png",
                       "confusion.png"}  # fmt: skip
    rows = {(row["label"], row["metric"]): row for row in rows_of(tmp_path / "out" / "scores.csv")}
    known = ~np.isnan(given.labels[:, 1])
    truth, score = given.labels[known, 1], given.probabilities[known, 1]
    one = rows["effusion", "auc"]
    assert float(one["value"]) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    assert float(one["low"]) < float(one["value"]) < float(one["high"])
    assert (int(one["images"]), int(one["positives"])) == (len(truth), truth.sum())
    found_half = recall_score(truth, score >= 0.5)
    assert float(rows["effusion", "sensitivity"]["value"]) == pytest.approx(found_half, abs=1e-12)
    accuracy = rows["effusion", "accuracy"]
    assert float(accuracy["largest_class"]) == pytest.approx(max(truth.mean(), 1 - truth.mean()))
    text = (tmp_path / "out" / "scores.md").read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if "ROC AUC" in line][0]
    assert "| accuracy | largest class alone |" in head and "| threshold |" in head
    assert f"resamples of the {len(set(given.groups))} groups, seed 0" in text
    assert json.loads((tmp_path / "out" / "about.json").read_text())["predictions"][0]["thresholds"]["hernia"] == 0.5


def test_without_a_threshold_labels_have_no_sensitivity_and_it_is_said(file):
    found = assess([file("a.csv", labels(0, many_images=False))], Asked(**FEW))
    text = found.text()
    assert "sensitivity |" not in text and "accuracy |" not in text
    assert "need a threshold: --threshold-from FILE" in text
    assert "No groups are known" in text


def test_classes_have_accuracy_beside_the_largest_class(file):
    given = classes()
    found = assess([file("c.csv", given)], Asked(**FEW))
    last = [line for line in found.text().splitlines() if line.startswith("| all classes")][0]
    hits = (given.probabilities.argmax(1) == given.labels).mean()
    share = np.bincount(given.labels).max() / len(given.labels)
    assert f"| {hits:.3f} (" in last and f"| {share:.3f} |" in last
    assert "of no image" not in found.text()
    never = given.probabilities * (1, 1, 1e-3)
    rare = assess([file("r.csv", replace(given, probabilities=never / never.sum(1, keepdims=True)))], Asked(**FEW))
    assert "* b is the most probable class of no image." in rare.text()
    counts = figures.confusion(found.evaluations[0]).axes[0].texts
    expected = confusion_matrix(given.labels, given.probabilities.argmax(1))
    assert [int(each.get_text()) for each in counts] == expected.ravel().tolist()


def test_labels_with_one_value_are_named(file):
    given = labels(0)
    given.labels[:, 2] = 0
    given.labels[:, 0] = np.nan
    text = assess([file("a.csv", given)], Asked(**FEW)).text()
    assert "* No AUC of hernia: all 300 known labels are 0; not in the mean." in text
    assert "* No AUC of edema: no label is known; not in the mean." in text
    given.labels[5, 2] = 1  # of one patient, whom a third of the resamples do not hold
    text = assess([file("b.csv", given)], Asked(**FEW)).text()
    lacking = int(re.search(r"AUC of hernia: (\d+) resamples have one value only", text)[1])
    assert 0.2 < lacking / 120 < 0.55


def test_thresholds_and_temperature_come_from_other_data(file):
    other = labels(1, truth_of=1, sure=8)
    given = file("a.csv", labels(0, sure=8))
    found = assess([given], Asked(threshold_from=[file("val.csv", other)], **FEW))
    chosen = found.about["predictions"][0]
    for k, name in enumerate(NAMES):
        assert chosen["thresholds"][name] == thresholds.youden(other.labels[:, k], other.probabilities[:, k])
    assert "Thresholds by Youden's index on" in found.text()
    sensitive = assess([given], Asked(threshold_from=[file("val.csv", other)], sensitivity=0.9, **FEW))
    limits = sensitive.about["predictions"][0]["thresholds"]
    known = ~np.isnan(other.labels[:, 1])
    assert recall_score(other.labels[known, 1], other.probabilities[known, 1] >= limits["effusion"]) >= 0.9
    both = assess([given], Asked(threshold_from=[file("val.csv", other)], calibrate=[file("val.csv", other)], **FEW))
    about = both.about["predictions"][0]
    assert about["temperature"] > 1.5
    before, after = found.evaluations[0].values, both.evaluations[0].values
    assert after["brier"][-1, 0] < before["brier"][-1, 0]
    assert after["auc"] == pytest.approx(before["auc"], nan_ok=True)
    assert after["sensitivity"] == pytest.approx(before["sensitivity"])  # thresholds move with the probabilities


def test_a_label_that_has_one_value_where_thresholds_are_chosen_has_none(file):
    other = labels(1, truth_of=1)
    other.labels[:, 2] = 0
    found = assess([file("a.csv", labels(0))], Asked(threshold_from=[file("val.csv", other)], **FEW))
    assert np.isnan(found.evaluations[0].values["sensitivity"][2, 0])
    assert not np.isnan(found.evaluations[0].values["sensitivity"][[0, 1, 3], 0]).any()
    line = [line for line in found.text().splitlines() if line.startswith("| hernia")][0]
    assert line.endswith(f"| {tables.NONE} |")


def test_two_files_are_compared_on_the_same_resamples(file, tmp_path, monkeypatch):
    first, second = file("a.csv", labels(0)), file("b.csv", labels(1, skill=0.7))
    found = assess([first, second], Asked(threshold=0.5, **FEW))
    found.save(tmp_path / "out", "svg")
    assert {"confusion-1.svg", "confusion-2.svg", "differences.csv"} <= {p.name for p in (tmp_path / "out").iterdir()}
    rows = {(row["label"], row["metric"]): row for row in rows_of(tmp_path / "out" / "differences.csv")}
    ours, theirs = found.evaluations
    one = rows["edema", "auc"]
    assert float(one["difference"]) == pytest.approx(ours.values["auc"][0, 0] - theirs.values["auc"][0, 0])
    assert 0 < float(one["delong_p"]) <= float(one["delong_p_holm"]) < 0.05
    assert rows["edema", "brier"]["delong_p"] == ""
    expected = np.quantile(ours.replicates["auc"][0] - theirs.replicates["auc"][0], (0.025, 0.975))
    assert [float(one["low"]), float(one["high"])] == pytest.approx(expected)
    paired = float(one["high"]) - float(one["low"])
    both = assess([second], Asked(**FEW)).evaluations[0].estimate("auc", 0)
    assert paired < (both.high - both.low) + ours.estimate("auc", 0).high - ours.estimate("auc", 0).low
    assert "Obuchowski" in found.text()
    same = assess([first, first], Asked(**FEW))
    one = evaluation.difference(*same.evaluations, "auc", 0)
    assert (one.value, one.low, one.high) == (0, 0, 0)
    monkeypatch.setattr(figures, "save", lambda *_: [])
    assess([first], Asked(**FEW)).save(tmp_path / "out", "svg")  # leaves nothing of the comparison behind
    assert not (tmp_path / "out" / "differences.csv").exists()


def test_subgroups_and_their_gaps(file, tmp_path):
    given = labels(0)
    worse = np.array([int(group[1:]) % 2 == 1 for group in given.groups])
    given.probabilities[worse] = np.random.default_rng(0).random((worse.sum(), 3))
    table = tmp_path / "t.csv"
    table.write_text("patient,sex\n" + "".join(f"p{i},{'MF'[i % 2]}\n" for i in range(75)))
    found = assess([file("a.csv", given)], Asked(threshold=0.5, by="sex", table=table, **FEW))
    found.save(tmp_path / "out", "png")
    rows = {(row["label"], row["metric"]): row for row in rows_of(tmp_path / "out" / "gaps.csv")}
    one = rows["edema", "auc"]
    assert (one["highest"], one["lowest"]) == ("M", "F") and float(one["low"]) > 0.2
    part = given.labels[~worse, 0], given.probabilities[~worse, 0]
    known = ~np.isnan(part[0])
    alone = roc_auc_score(part[0][known], part[1][known])
    assert found.parts[0]["M"].values["auc"][0, 0] == pytest.approx(alone, abs=1e-12)
    scores = [row for row in rows_of(tmp_path / "out" / "scores.csv") if row["subgroup"] == "M"]
    assert {row["label"] for row in scores} == {*NAMES, "mean"}
    assert "M over F: " in found.text() and "Joined by patient of" in found.text()


def test_what_cannot_be_asked(file):
    given = file("a.csv", labels(0))
    with pytest.raises(UserError, match="3 files of predictions; expected one, or two"):
        assess([given] * 3, Asked())
    with pytest.raises(UserError, match="--calibrate names 1 for 2 files"):
        assess([given, given], Asked(calibrate=[given]))
    with pytest.raises(UserError, match="are scored too"):
        assess([given], Asked(threshold_from=[given]))


def test_long_tables_are_shortened_for_people_only(file):
    rng = np.random.default_rng(0)
    names = tuple(f"label {i}" for i in range(30))
    truth = (rng.random((50, 30)) < 0.5).astype(float)
    truth[:, 3:25] = 0
    given = Predictions([str(i) for i in range(50)], [""] * 50, names, rng.random((50, 30)), truth, True)
    found = assess([file("a.csv", given)], Asked(**FEW))
    short, whole = found.text(5), found.text()
    assert "| label 29 |" in whole and "| label 20 |" in whole and "more" not in whole
    assert "| label 20 |" not in short and "| mean |" in short and "… and 24 rows more" in short
    assert len(figures._shown(found.evaluations[0])) == figures.MOST


@pytest.mark.parametrize("given", [labels(0, n=40), classes(n=40)], ids=["labels", "classes"])
def test_names_are_drawn_as_they_are(file, tmp_path, given):
    given = replace(given, names=("a|b", "$\\frac$", "mean"))
    found = assess([file("a.csv", given)], Asked(threshold=0.5, **FEW))
    assert all(path.stat().st_size > 1000 for path in found.save(tmp_path / "$\\x$", "png") if path.suffix == ".png")
    assert r"| a\|b |" in found.text()


def test_means_differ_by_the_labels_that_both_subgroups_have(file, tmp_path):
    """A subgroup without the label that is predicted worst does not come out ahead for it."""
    given = labels(0)
    half = np.arange(300) % 2 == 0
    given.labels[:, 2] = np.where(half, np.arange(300) % 4 == 0, 0)  # by chance, in one half only
    table = tmp_path / "t.csv"
    table.write_text("key,half\n" + "".join(f"{key},{'ab'[i % 2]}\n" for i, key in enumerate(given.keys)))
    found = assess([file("a.csv", given)], Asked(by="half", table=table, **FEW))
    parts = found.parts[0]
    assert np.isnan(parts["b"].values["auc"][2, 0]) and not np.isnan(parts["a"].values["auc"][2, 0])
    means = {name: part.values["auc"][:2, 0].mean() for name, part in parts.items()}
    one = evaluation.gap(parts, "auc", 3)
    assert one.highest == max(means, key=means.get)
    assert one.estimate.value == pytest.approx(max(means.values()) - min(means.values()))
    off = [parts[one.highest].replicates["auc"][k] - parts[one.lowest].replicates["auc"][k] for k in (0, 1)]
    assert [one.estimate.low, one.estimate.high] == pytest.approx(np.quantile(np.mean(off, 0), (0.025, 0.975)))
