"""Scores of predicted probabilities, of each label and of their mean, for all images and for resamples of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.statistics import bootstrap
from engine.statistics.areas import Ranked

AUC, PRECISION, SENSITIVITY, SPECIFICITY = "auc", "average_precision", "sensitivity", "specificity"
ACCURACY, BRIER, CALIBRATION = "accuracy", "brier", "ece"
METRICS = (AUC, PRECISION, SENSITIVITY, SPECIFICITY, ACCURACY, BRIER, CALIBRATION)
BINS = 15
"""Of the expected calibration error, equally wide (Guo et al., 2017)."""
_LABELS_AT_ONCE = 32
_LANES = 32
"""Weightings in whose areas a label's rows stay in the processor's cache."""
_EXACT = 2**22
"""With fewer images sums of their weights are whole numbers that float32 holds, however a resample falls out."""


@dataclass(frozen=True)
class Images:
    """What is scored: n images, k classes or labels."""

    truth: np.ndarray  # (n, k) float64 of 0, 1, or NaN for unknown; of classes one 1 in a row, or all NaN
    probabilities: np.ndarray  # (n, k) float64
    groups: np.ndarray  # (n,) int64, numbers of the groups that are drawn together
    count: int  # of groups
    many: bool  # several labels at once; else one of k classes
    said: np.ndarray | None = None  # (n, k) float64, labels said to be there: 1, 0, or NaN where nothing was said

    def part(self, rows: np.ndarray) -> Images:
        """Only some images, of the same groups, so that the same resamples are drawn. rows: (n,) bool."""
        said = None if self.said is None else self.said[rows]
        return Images(self.truth[rows], self.probabilities[rows], self.groups[rows], self.count, self.many, said)


Scores = Mapping[str, np.ndarray]
"""Metric → (rows, b): a row for each label, one for their mean, and, of one-of-many classes, one for all of them
together (accuracy of the most probable class, its calibration error, the Brier score summed over classes). NaN where
there is none."""


def of_all(images: Images) -> Scores:
    """The scores of all images: b = 1."""
    return of_weights(images, np.ones((images.count, 1)))


def of_resamples(images: Images, count: int, seed: int, advance: Callable[[int], None] | None = None) -> Scores:
    """The scores of `count` resamples of the groups: b = count. Equal seeds and groups draw the same resamples.

    `advance` is told of so many resamples that are done, of `passes` times `count`.
    """
    return _scores(images, lambda call: bootstrap.over_resamples(call, images.count, count, seed, advance))


def passes(images: Images) -> int:
    """How often all resamples are gone through: for so many labels at once, and for all classes together."""
    return -(-images.truth.shape[1] // _LABELS_AT_ONCE) + (not images.many)


def of_weights(images: Images, weights: np.ndarray) -> Scores:
    """The scores where each group counts as often as (groups, b) whole numbers say."""
    return _scores(images, lambda call: [call(weights.astype(np.float32))])


def row_names(names: Sequence[str], many: bool) -> list[str]:
    """What the rows of scores are called."""
    return [*names, "mean"] if many else [*names, "mean", "all classes"]


def largest_share(images: Images) -> np.ndarray:
    """(rows,) share of the more frequent value of each label, of the most frequent class for all classes together: the
    accuracy of who always says that. NaN for the mean, and where nothing is known."""
    positive = _mean_known(images.truth)
    if images.many:
        return np.append(np.maximum(positive, 1 - positive), np.nan)
    return np.concatenate([np.full(len(positive) + 1, np.nan), [positive.max()]])


def _mean_known(truth: np.ndarray) -> np.ndarray:
    known = ~np.isnan(truth)
    count = known.sum(0)
    return np.divide(np.where(known, truth, 0).sum(0), count, out=np.full(truth.shape[1], np.nan), where=count > 0)


_Block = dict[str, np.ndarray]  # metric → (rows, b), of a block of weightings


def _scores(images: Images, over_blocks: Callable[[Callable[[np.ndarray], _Block]], list[_Block]]) -> _Block:
    def side_by_side(part: _Labels | _Classes) -> _Block:
        blocks = over_blocks(part.scores)
        return {name: np.concatenate([block[name] for block in blocks], axis=1) for name in blocks[0]}

    labels = images.truth.shape[1]
    each = [
        side_by_side(_Labels.of(images, range(first, min(first + _LABELS_AT_ONCE, labels))))
        for first in range(0, labels, _LABELS_AT_ONCE)
    ]
    found = {name: np.concatenate([part[name] for part in each]) for name in METRICS}
    found = {name: np.concatenate([values, nan_mean(values)[None]]) for name, values in found.items()}
    if not images.many:
        together = side_by_side(_Classes.of(images))
        nothing = np.full_like(found[AUC][:1], np.nan)
        found[ACCURACY][:] = np.nan  # of one class against all others it is high for whoever never says the class
        found = {name: np.concatenate([values, together.get(name, nothing)]) for name, values in found.items()}
    return found


@dataclass(frozen=True)
class _Labels:
    """Some labels, made ready for many weightings."""

    ranked: list[Ranked]
    columns: np.ndarray  # (labels * width, groups) float64: what is summed over images with their weights
    exact: bool  # float32 holds the sums of weights

    @classmethod
    def of(cls, images: Images, labels: range) -> _Labels:
        ranked, columns = [], []
        for label in labels:
            truth, probabilities = images.truth[:, label], images.probabilities[:, label]
            ranked.append(Ranked.of(truth, probabilities, images.groups))
            said = None if images.said is None else images.said[:, label]
            columns += _of_label(truth, probabilities, said, images.groups, images.count)
        return cls(ranked, np.array(columns), len(images.groups) < _EXACT)

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Metric → (labels, b), from (groups, b) float32."""
        import torch

        single = torch.from_numpy(weights)
        double = single.double()
        lanes = [part.contiguous() for part in (single if self.exact else double).split(_LANES, 1)]
        areas = [[np.concatenate(each) for each in zip(*map(one.areas, lanes), strict=True)] for one in self.ranked]
        sums = (torch.from_numpy(self.columns) @ double).numpy().reshape(len(self.ranked), -1, weights.shape[1])
        positives, negatives, hits, passes, squares, off = (
            sums[:, 0], sums[:, 1], sums[:, 2], sums[:, 3], sums[:, 4], sums[:, 5:],
        )  # fmt: skip
        known = positives + negatives
        return {
            AUC: np.stack([area for area, _ in areas]),
            PRECISION: np.stack([average for _, average in areas]),
            SENSITIVITY: _share(hits, positives),
            SPECIFICITY: _share(passes, negatives),
            ACCURACY: _share(hits + passes, known),
            BRIER: _share(squares, known),
            CALIBRATION: _share(np.abs(off).sum(1), known),
        }


def _of_label(
    truth: np.ndarray, probabilities: np.ndarray, said: np.ndarray | None, groups: np.ndarray, count: int
) -> list[np.ndarray]:
    """Sums over the images of each group, (groups,): positives, negatives, those of each that were said, and not said,
    to be there, squared errors, and what labels and probabilities differ by in each bin of probability."""
    known = ~np.isnan(truth)
    truth, probabilities, groups = truth[known], probabilities[known], groups[known]
    right = np.full(len(truth), np.nan) if said is None else 1 - np.abs(said[known] - truth)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(groups, values, count)

    return [
        total(truth), total(1 - truth), total(truth * right), total((1 - truth) * right),
        total((truth - probabilities) ** 2), *_off(truth, probabilities, groups, count),
    ]  # fmt: skip


def _off(truth: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """(BINS, groups): sums of truth - probability over the images of a group whose probability is in a bin."""
    return np.bincount(bin_of(probabilities) * count + groups, truth - probabilities, BINS * count).reshape(BINS, count)


def bin_of(probabilities: np.ndarray) -> np.ndarray:
    """Which of BINS equally wide bins a probability is in; the upper end of one is the lower of the next."""
    return np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)


@dataclass(frozen=True)
class _Classes:
    """All classes together, made ready for many weightings."""

    columns: np.ndarray  # (3 + BINS, groups)

    @classmethod
    def of(cls, images: Images) -> _Classes:
        known = ~np.isnan(images.truth[:, 0])
        truth, probabilities, groups = images.truth[known], images.probabilities[known], images.groups[known]
        best = probabilities.argmax(1)
        right = truth[np.arange(len(truth)), best]
        sums = [np.ones(len(truth)), right, ((truth - probabilities) ** 2).sum(1)]
        totals = [np.bincount(groups, values, images.count) for values in sums]
        return cls(np.array([*totals, *_off(right, probabilities.max(1, initial=0), groups, images.count)]))

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        known, right, squares, *off = self.columns @ weights.astype(np.float64)
        return {
            ACCURACY: _share(right, known)[None],
            BRIER: _share(squares, known)[None],
            CALIBRATION: _share(np.abs(off).sum(0), known)[None],
        }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def nan_mean(values: np.ndarray) -> np.ndarray:
    """(b,) mean over those of (rows, b) that have a value; NaN where none has."""
    there = ~np.isnan(values)
    return _share(np.where(there, values, 0).sum(0), there.sum(0).astype(np.float64))
