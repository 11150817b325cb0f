"""Scores of a case with intervals; what two cases, or subgroups of one, differ by on the same resamples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engine.evaluating.case import Case
from engine.statistics import bootstrap, delong, paired, thresholds
from engine.statistics.scores import (
    AUC,
    METRICS,
    Images,
    Scores,
    largest_share,
    nan_mean,
    of_all,
    of_resamples,
    row_names,
)


@dataclass(frozen=True)
class Estimate:
    """A score, or what two differ by, with the 95% percentile interval of its resamples."""

    value: float
    low: float
    high: float
    resamples: int  # how many had a value

    @classmethod
    def of(cls, value: float, replicates: np.ndarray) -> Estimate:
        """From (b,) replicates, NaN where there is none."""
        return cls(float(value), *bootstrap.interval(replicates))


@dataclass(frozen=True)
class Evaluation:
    """The scores of some images."""

    title: str
    rows: list[str]  # labels, their mean, perhaps all classes together
    images: Images
    values: Scores  # metric → (rows, 1)
    replicates: Scores  # metric → (rows, resamples)
    shares: np.ndarray  # (rows,) of the largest class

    def estimate(self, metric: str, row: int) -> Estimate:
        """A score with its interval."""
        return Estimate.of(self.values[metric][row, 0], self.replicates[metric][row])

    @property
    def labels(self) -> int:
        """How many labels or classes there are: also the row of their mean."""
        return self.images.truth.shape[1]

    @property
    def metrics(self) -> list[str]:
        """Those that some row has."""
        return [name for name in METRICS if not np.isnan(self.values[name]).all()]

    def counts(self, row: int) -> tuple[int, int]:
        """Positives and known labels of a row; of the mean and of all classes how many images have a known label."""
        truth = self.images.truth
        if row >= self.labels:
            known = int((~np.isnan(truth)).any(1).sum())
            return known, known
        return int(np.nansum(truth[:, row])), int((~np.isnan(truth[:, row])).sum())


def evaluate(
    case: Case,
    said: np.ndarray | None,
    resamples: int,
    seed: int,
    rows: np.ndarray | None = None,
    advance: Callable[[int], None] | None = None,
) -> Evaluation:
    """The scores of a case, or of the images in `rows` (n,) bool; resamples are of all its groups either way.

    said: as of `decisions`; None: sensitivity, specificity and the accuracy of labels are left out. `advance`: as of
    `scores.of_resamples`.
    """
    images = replace(case.images, said=said)
    if rows is not None:
        images = images.part(rows)
    return Evaluation(
        case.title,
        row_names(case.names, images.many),
        images,
        of_all(images),
        of_resamples(images, resamples, seed, advance),
        largest_share(images),
    )


def decisions(case: Case, limits: np.ndarray | None) -> np.ndarray | None:
    """(n, k) float64, which labels are said to be there: 1 from (k,) thresholds on, else 0, NaN where a threshold is;
    without them the most probable of one-of-many classes, and nothing of several labels (None)."""
    probabilities = case.images.probabilities
    if limits is not None:
        return np.where(np.isnan(limits), np.nan, probabilities >= limits)
    if case.images.many:
        return None
    return np.eye(probabilities.shape[1])[probabilities.argmax(1)]


def choose_thresholds(other: Case, sensitivity: float | None) -> np.ndarray:
    """(k,) thresholds by Youden's index on other data, or the highest with a sensitivity; NaN: one value only."""
    pairs = zip(other.images.truth.T, other.images.probabilities.T, strict=True)
    if sensitivity is None:
        return np.array([thresholds.youden(truth, scores) for truth, scores in pairs])
    return np.array([thresholds.for_sensitivity(truth, scores, sensitivity) for truth, scores in pairs])


def difference(
    ours: Evaluation, theirs: Evaluation, metric: str, row: int, labels: np.ndarray | None = None
) -> Estimate:
    """Ours minus theirs, of the same images or of parts of them, on the same resamples.

    Of the mean that over those labels, of all or of `labels` (k,) bool, that both have: in all images, in a resample.
    """
    values = ours.values[metric] - theirs.values[metric]
    replicates = ours.replicates[metric] - theirs.replicates[metric]
    if row == ours.labels:
        some = np.arange(row) if labels is None else labels
        return Estimate.of(nan_mean(values[:row][some])[0], nan_mean(replicates[:row][some]))
    return Estimate.of(values[row, 0], replicates[row])


def auc_tests(ours: Evaluation, theirs: Evaluation) -> tuple[list[delong.Comparison | None], list[float]]:
    """DeLong's test of each label, and its p adjusted for the number of labels (Holm); NaN where there is none."""
    a, b = ours.images, theirs.images
    found = [
        delong.compare(a.truth[:, k], a.probabilities[:, k], b.probabilities[:, k], a.groups)
        for k in range(ours.labels)
    ]
    adjusted = iter(paired.holm([one.p for one in found if one]))
    return found, [next(adjusted) if one else float("nan") for one in found]


@dataclass(frozen=True)
class Gap:
    """What the subgroups with the highest and the lowest score differ by."""

    highest: str
    lowest: str
    estimate: Estimate


def gap(parts: Mapping[str, Evaluation], metric: str, row: int) -> Gap | None:
    """Of those subgroups that have a score; None of fewer than two. Which two they are is fixed for the interval.

    The mean is here over the labels that all subgroups with a mean have.
    """
    scores = {name: one.values[metric][:, 0] for name, one in parts.items()}
    scores = {name: values for name, values in scores.items() if not np.isnan(values[row])}
    if len(scores) < 2:
        return None
    having = {name: values[row] for name, values in scores.items()}
    shared: np.ndarray | None = None
    labels = next(iter(parts.values())).labels
    if row == labels:
        shared = ~np.isnan(np.sum([values[:labels] for values in scores.values()], axis=0))
        if not shared.any():
            return None
        having = {name: values[:labels][shared].mean() for name, values in scores.items()}
    highest, lowest = max(having, key=having.__getitem__), min(reversed(having), key=having.__getitem__)
    return Gap(highest, lowest, difference(parts[highest], parts[lowest], metric, row, shared))


def without_auc(evaluation: Evaluation) -> Sequence[tuple[str, str]]:
    """The labels that have no AUC, and why not."""
    found = []
    for row in range(evaluation.labels):
        if np.isnan(evaluation.values[AUC][row, 0]):
            positives, known = evaluation.counts(row)
            why = f"all {known:,} known labels are {int(positives > 0)}" if known else "no label is known"
            found.append((evaluation.rows[row], why))
    return found
