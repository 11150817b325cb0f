"""Evaluations as tables: Markdown for people, CSV with a row for each score for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from engine.evaluating.evaluation import Estimate, Evaluation, Gap, auc_tests, difference, gap
from engine.statistics.scores import ACCURACY, AUC, BRIER, CALIBRATION, PRECISION, SENSITIVITY, SPECIFICITY

HEADINGS = {AUC: "ROC AUC", PRECISION: "AUPRC", SENSITIVITY: "sensitivity", SPECIFICITY: "specificity",
            ACCURACY: "accuracy", BRIER: "Brier", CALIBRATION: "ECE"}  # fmt: skip
SCORE_FIELDS = ("predictions", "subgroup", "label", "metric", "value", "low", "high", "resamples", "images",
                "positives", "largest_class", "threshold")  # fmt: skip
DIFFERENCE_FIELDS = ("predictions", "minus", "label", "metric", "difference", "low", "high", "resamples", "delong_z",
                     "delong_p", "delong_p_holm")  # fmt: skip
GAP_FIELDS = ("predictions", "column", "label", "metric", "highest", "lowest", "gap", "low", "high", "resamples")
NONE = "–"


def number(estimate: Estimate, signed: bool = False) -> str:
    """A score with its interval."""
    if math.isnan(estimate.value):
        return NONE
    sign = "+" if signed else ""
    if math.isnan(estimate.low):
        return f"{estimate.value:{sign}.3f}"
    return f"{estimate.value:{sign}.3f} ({estimate.low:{sign}.3f} to {estimate.high:{sign}.3f})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"


def scores(evaluation: Evaluation, limits: np.ndarray | None) -> str:
    """A row for each label, and for what is said of all of them."""
    metrics = evaluation.metrics
    shown = ACCURACY in metrics
    head = ["", "positives / known", *(HEADINGS[name] for name in metrics)]
    if shown:  # never an accuracy without what it has to be compared with
        head.insert(head.index(HEADINGS[ACCURACY]) + 1, "largest class alone")
    head += ["threshold"] if limits is not None else []
    rows = []
    for row, name in enumerate(evaluation.rows):
        positives, known = evaluation.counts(row)
        label = row < evaluation.labels
        cells = [name, f"{positives:,} / {known:,}" if label else f"{known:,} images"]
        for metric in metrics:
            cells.append(number(evaluation.estimate(metric, row)))
            if metric == ACCURACY:
                cells.append(_plain(evaluation.shares[row]))
        if limits is not None:
            cells.append(f"{limits[row]:.4g}" if label and not math.isnan(limits[row]) else NONE)
        rows.append(cells)
    return markdown(head, rows)


def _plain(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.3f}"


def differences(ours: Evaluation, theirs: Evaluation) -> str:
    """Ours minus theirs, a row for each label, with DeLong's test of the AUC."""
    tests, adjusted = auc_tests(ours, theirs)
    metrics = [name for name in ours.metrics if name in theirs.metrics]
    rows = []
    for row, name in enumerate(ours.rows):
        cells = [name, *(number(difference(ours, theirs, metric, row), signed=True) for metric in metrics)]
        test = tests[row] if row < len(tests) else None
        cells += [_p(test.p), _p(adjusted[row])] if test else [NONE, NONE]
        rows.append(cells)
    return markdown(["", *(HEADINGS[name] for name in metrics), "p of AUC (DeLong)", "adjusted (Holm)"], rows)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def gaps(parts: Mapping[str, Evaluation]) -> str:
    """Of each label the subgroups with the highest and the lowest score, and what these differ by."""
    first = next(iter(parts.values()))
    metrics = [name for name in HEADINGS if any(name in part.metrics for part in parts.values())]
    rows = []
    for row, name in enumerate(first.rows):
        found = [gap(parts, metric, row) for metric in metrics]
        rows.append([name, *(NONE if one is None else _gap(one) for one in found)])
    return markdown(["", *(HEADINGS[name] for name in metrics)], rows)


def _gap(one: Gap) -> str:
    return f"{one.highest} over {one.lowest}: {number(one.estimate)}"


def score_rows(evaluation: Evaluation, limits: np.ndarray | None, subgroup: str = "") -> list[list[object]]:
    """Of SCORE_FIELDS; only scores that there are."""
    rows: list[list[object]] = []
    for row, name in enumerate(evaluation.rows):
        positives, known = evaluation.counts(row)
        label = row < evaluation.labels
        limit = "" if limits is None or not label or math.isnan(limits[row]) else float(limits[row])
        share = "" if math.isnan(evaluation.shares[row]) else float(evaluation.shares[row])
        for metric in evaluation.metrics:
            one = evaluation.estimate(metric, row)
            if not math.isnan(one.value):
                rows.append(
                    [evaluation.title, subgroup, name, metric, *_cells(one), known, positives if label else "", share,
                     limit]
                )  # fmt: skip
    return rows


def difference_rows(ours: Evaluation, theirs: Evaluation) -> list[list[object]]:
    """Of DIFFERENCE_FIELDS."""
    tests, adjusted = auc_tests(ours, theirs)
    rows: list[list[object]] = []
    for row, name in enumerate(ours.rows):
        for metric in (metric for metric in ours.metrics if metric in theirs.metrics):
            one = difference(ours, theirs, metric, row)
            test = tests[row] if row < len(tests) and metric == AUC else None
            said = [test.z, test.p, adjusted[row]] if test else ["", "", ""]
            if not math.isnan(one.value):
                rows.append([ours.title, theirs.title, name, metric, *_cells(one), *said])
    return rows


def gap_rows(parts: Mapping[str, Evaluation], column: str) -> list[list[object]]:
    """Of GAP_FIELDS."""
    first = next(iter(parts.values()))
    found = ((name, metric, gap(parts, metric, row)) for row, name in enumerate(first.rows) for metric in HEADINGS)
    return [
        [first.title, column, name, metric, one.highest, one.lowest, *_cells(one.estimate)]
        for name, metric, one in found
        if one
    ]


def _cells(one: Estimate) -> list[object]:
    return [one.value, "" if math.isnan(one.low) else one.low, "" if math.isnan(one.high) else one.high, one.resamples]


def text(fields: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV."""
    out = io.StringIO()
    file = csv.writer(out, lineterminator="\n")
    file.writerow(fields)
    file.writerows(rows)
    return out.getvalue()
